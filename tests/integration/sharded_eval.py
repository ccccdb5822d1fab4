"""A detector that finds something in real images, and a script that evaluates it as the training does.

``sharded_eval.py CHECKPOINT FOLDER OUT`` evaluates with however many processes it was launched; each of them writes
what it got.

Legend: Q queries, C classes, D hidden_dim, N objects of an image.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

from detr_accel import data, evaluate, models
from detr_accel import recipe as recipes
from detr_accel.infer import detector
from detr_accel.models import weights

COCO_FREE = Path(__file__).parents[3] / "shared/data/coco_free"
RECIPE = """
name: sharded
data: {format: coco, root: /data, eval_size: 96, eval_max_size: 128, workers: 0}
model:
  backbone: {name: test_resnet, weights: none}
  hidden_dim: 128
  num_heads: 4
  num_encoder_layers: 1
  num_decoder_layers: 1
  dim_feedforward: 128
  num_queries: 40
evaluate: {batch: 3}
"""


@torch.no_grad()
def fit(folder: Path, out: Path) -> None:
    """Save a detector with a random body whose two last linear layers are solved for the validation split of a folder.

    Query i of an image is made to answer with the image's object i, and the others with nothing, in least squares:
    seconds instead of a training, and detections of every quality.
    """
    recipe = recipes.loads(RECIPE)
    source = data.eval_source(recipe, folder, "val")
    torch.manual_seed(0)
    model = models.build(recipe, len(source.classes)).eval()
    model.query_embed.weight.mul_(3)
    heads = {"class": model.class_embed, "box": model.bbox_embed.layers[-1]}
    seen: dict[str, torch.Tensor] = {}
    for name, layer in heads.items():
        layer.register_forward_pre_hook(lambda _, inputs, name=name: seen.update({name: inputs[0][-1]}))  # [B, Q, D]
    rows: dict[str, list] = {"class": [], "box": []}
    for batch in data.eval_batches(recipe, source, rank=0, num_ranks=1, mean=model.mean, std=model.std):
        model(batch.images, batch.mask)
        for i, target in enumerate(batch.targets):
            n = min(len(target.labels), model.num_queries)
            logits = torch.zeros(model.num_queries, len(source.classes) + 1)  # [Q, C + 1]
            logits[:n].scatter_(1, target.labels[:n, None], 6.0)
            logits[n:, -1] = 6.0
            rows["class"].append((seen["class"][i], logits))
            rows["box"].append((seen["box"][i, :n], target.boxes_cxcywh[:n].clamp(0.01, 0.99).logit()))
    for name, layer in heads.items():
        inputs, wanted = (torch.cat(part).double() for part in zip(*rows[name], strict=True))
        inputs = torch.cat((inputs, torch.ones(len(inputs), 1)), 1)  # the last column is the bias
        solved = torch.linalg.lstsq(inputs, wanted, driver="gelsd").solution.float()
        layer.weight.copy_(solved[:-1].T)
        layer.bias.copy_(solved[-1])
    weights.save(out, model, recipes.dumps(recipe), source.classes, {"weights": "raw"})


def main(checkpoint: Path, folder: Path, out: Path) -> None:
    from accelerate import Accelerator
    from accelerate.utils import broadcast_object_list, gather_object

    from detr_accel.train import set_loss

    accelerator = Accelerator(cpu=True)
    state = accelerator.state
    found = detector.load(checkpoint, device="cpu")
    recipe = found.recipe
    source = data.eval_source(recipe, folder, "val")
    to_category, _ = evaluate.match_classes(found.classes, source.classes)

    def batches():
        return data.eval_batches(
            recipe, source, rank=state.process_index, num_ranks=state.num_processes, mean=found.model.mean,
            std=found.model.std,
        )  # fmt: skip

    metrics = evaluate.run(
        lambda batch: found(batch, recipe.evaluate.max_detections), batches(), ground_truth=source.ground_truth(),
        to_category=to_category, gather=gather_object, broadcast=broadcast_object_list,
        is_main=state.is_main_process, max_detections=recipe.evaluate.max_detections,
        num_queries=recipe.model.num_queries, backend=recipe.evaluate.backend,
    )  # fmt: skip
    criterion = models.build_criterion(recipe, len(found.classes))
    losses = set_loss.over(batches(), found.model, criterion, accelerator)
    result = {"losses": losses, "processes": state.num_processes, "values": metrics.values, "whole": metrics.to_json()}
    Path(f"{out}.{state.process_index}").write_text(json.dumps(result))
    state.destroy_process_group()


if __name__ == "__main__":
    main(*(Path(argument) for argument in sys.argv[1:]))
