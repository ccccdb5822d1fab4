"""The alarms that depend on clock and memory, in the form of those in alarm_rules.py; they remember nothing over a
resume."""

from __future__ import annotations

from detr_accel.monitor import feeding
from detr_accel.monitor.alarm_rules import About, Alarm, Past, Rule
from detr_accel.structures import LoaderTime, StepStats

WINDOWS = 50
STARVED = 0.3  # of the time


def device_starved(now: StepStats, past: Past, about: About) -> Alarm | None:
    """On a CPU the loader works on the same cores, so waiting for it says nothing."""
    total, waited = sum(row[0] for row in past.machine), sum(row[1] for row in past.machine)
    if not about.on_gpu or len(past.machine) < WINDOWS or waited <= STARVED * total:
        return None
    spent = sum((row[2] for row in past.machine), LoaderTime())
    cost, since = spent.per_image(), f"over the last {WINDOWS} windows"
    if cost.total == 0:
        return Alarm(
            f"{since} the device waited for images {100 * waited / total:.0f} % of the time: set data.workers=auto, or "
            "keep decoded images with data.cache"
        )
    feed = feeding.Feed(
        waited / total, cost, (total - waited) / WINDOWS, spent.images / WINDOWS, now.workers, about.cores,
        about.cached, now.prefetch, about.streamed,
    )  # fmt: skip
    times = f"read {1e3 * cost.read:.1f}, decode {1e3 * cost.decode:.1f}, pixels {1e3 * cost.pixels:.1f}"
    return Alarm(f"{since} {feeding.judge(feed).text} (a loader process's ms per image: {times})")


def memory_close(now: StepStats, past: Past, about: About) -> Alarm | None:
    if now.memory_fraction is None or now.memory_fraction < 0.95:
        return None
    where = "the GPU's memory" if about.on_gpu else "the machine's memory"
    return Alarm(
        f"{100 * now.memory_fraction:.0f} % of {where} is taken at window {now.window}: a larger window may not fit "
        "(it would then be repeated in smaller parts); lower batch.micro (batch.size stays), set "
        "model.activation_checkpointing=auto, or end what else uses the memory"
    )


MACHINE: dict[str, Rule] = {
    "Device waits for images": device_starved,
    "Memory nearly full": memory_close,
}
