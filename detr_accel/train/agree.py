"""Doing something so that all processes go on, or all refuse in the same words."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from typing import TypeVar

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object

from detr_accel.structures import UserError

T = TypeVar("T")


def on_main(accelerator: Accelerator, action: Callable[[], T]) -> T:
    """Do it on the main process and give every process what came of it (anything that can be pickled).

    Raises:
        UserError: on every process, where it refused or failed on the main one.
    """
    said: list = [None, None]
    failure: BaseException | None = None
    if accelerator.is_main_process:
        try:
            said[1] = action()
        except Exception as error:  # whatever it is, the others must not wait for it
            failure, said[0] = error, _words(error)
    broadcast_object_list(said)
    if failure is not None:
        raise failure
    if said[0] is not None:
        raise UserError(said[0])
    return said[1]


def everywhere(accelerator: Accelerator, action: Callable[[], T], at_once: bool = False) -> T:
    """Do it on every process, on each node's first one before the others (which then find what it downloaded).

    Args:
        at_once: all at the same time, because on one node they wait for each other in another way than an exchange
            between processes, which may not last longer than dist.timeout_minutes.
    Raises:
        UserError: on every process alike, where it refused or failed on any.
    """
    result, failure = None, None
    for turn in (True, False):
        if turn if at_once else accelerator.is_local_main_process is turn:
            try:
                result = action()
            except Exception as error:
                failure = error
                if not isinstance(error, UserError):
                    traceback.print_exc()
        if turn and not at_once:
            accelerator.wait_for_everyone()
    said = [text for text in gather_object([None if failure is None else _words(failure)]) if text]
    if said:
        raise UserError(said[0]) from failure
    return result


def _words(error: BaseException) -> str:
    return str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
