"""``accelerate launch`` of one process that starts none: the launcher reads its flags, this one runs the script."""

import os
import runpy
import sys

from accelerate.commands.launch import (
    _validate_launch_command,
    launch_command_parser,
    prepare_simple_launcher_cmd_env,
)

assert sys.argv[1] == "launch"
args, *_ = _validate_launch_command(launch_command_parser().parse_args(sys.argv[2:]))
assert args.num_processes == 1, "several processes need the real launcher"
_, env = prepare_simple_launcher_cmd_env(args)
os.environ.update(env)
sys.argv = [args.training_script, *args.training_script_args]
runpy.run_path(args.training_script, run_name="__main__")
