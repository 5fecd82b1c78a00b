"""Updates and policy steps on a GPU: the table of docs/scaling.md, in one command.

    python tests/benchmarks/gpu.py                  # all sizes; about ten minutes on a GPU
    python tests/benchmarks/gpu.py --device cpu --tiny   # a test of the setup

AMAGO on discrete actions, 7 discounts, 4 critics, bfloat16, compiled, 64k tokens an update.
"""

from __future__ import annotations

import argparse
import platform
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor
from torchrl.objectives import SoftUpdate

sys.path.insert(0, str(Path(__file__).parents[2]))

from tests.benchmarks.cost import Count, calibrate, seconds_of, update_flops
from tests.toy_env import ACTIONS, Toy
from torchrl_amago import amago_loss, make_optimizer, make_policy, make_trial_env
from torchrl_amago.objectives import AMAGOLoss
from torchrl_amago.scaling import compile_policy, pick_device, send
from torchrl_amago.trainers import FiniteOptimizationStepper

# Width, layers, hidden width of heads and critics; heads have 64 features.
SIZES = {
    "d 256, 3 layers": (256, 3, 256),
    "d 512, 6 layers": (512, 6, 512),
    "d 768, 12 layers": (768, 12, 512),
}
TINY = {"d 32, 1 layer": (32, 1, 32)}
# Nominal bfloat16 rates without sparsity, for the share of the peak.
PEAKS = {"H200": 990e12, "H100": 990e12, "A100": 312e12, "L40S": 362e12, "4090": 165e12}


def make_parts(
    size: tuple[int, int, int], rows: int, steps: int, device: torch.device
) -> tuple[AMAGOLoss, TensorDictBase]:
    """A loss and a batch of slices on a device."""
    width, layers, hidden = size
    env = make_trial_env(Toy(ACTIONS["categorical"], rows), horizon=10**6)
    options = {"d_model": width, "num_layers": layers, "num_heads": max(1, width // 64)}
    policy = make_policy(
        env,
        context_length=steps,
        seq_model_options=options,
        timestep_options={"hidden_size": hidden, "output_size": width},
        actor_options={"hidden_size": hidden},
        device=device,
    )
    loss = amago_loss(policy, critic_options={"hidden_size": hidden})
    if device.type != "meta":
        loss.target_update = SoftUpdate(loss, tau=0.003)
    few = env.rollout(8, break_when_any_done=False)
    batch = few[:, torch.arange(steps) % 8].clone()
    batch["time_idx"] = torch.arange(steps).view(1, -1, 1).expand(rows, -1, 1).clone()
    batch["next", "time_idx"] = batch["time_idx"] + 1
    batch["is_init"] = batch["time_idx"] == 0
    batch["collector"] = TensorDict(mask=torch.ones(rows, steps).bool(), batch_size=[rows, steps])
    return loss, send(loss.check(batch), device)


def make_update(
    loss: AMAGOLoss, batch: TensorDictBase, half: bool, compiled: bool
) -> Callable[[], None]:
    """An update, targets included, that has been compiled and recorded."""
    stepper = FiniteOptimizationStepper(1.0, "bf16" if half else "fp32", compile=compiled)
    trainer = SimpleNamespace(loss_module=loss, optimizer=make_optimizer(loss), replay_buffer=None)

    def update() -> None:
        stepper.step(trainer, batch)
        loss.target_update.step()

    for _ in range(6 if compiled else 2):
        update()
    return update


def count_gradients(loss: AMAGOLoss, batch: TensorDictBase) -> Count:
    """Count forward and backward."""
    with Count() as count:
        out = loss(batch)
        (out["loss_actor"] + out["loss_qvalue"]).backward()
    loss.zero_grad()
    return count


def table(rows: list[list[str]]) -> str:
    """A Markdown table, its first row the heading."""
    return "\n".join(
        "| " + " | ".join(row) + " |" for row in [rows[0], ["---"] * len(rows[0]), *rows[1:]]
    )


def updates(args: argparse.Namespace, device: torch.device) -> str:
    """Table of updates by size and length."""
    peak = next((rate for name, rate in PEAKS.items() if name in device_name(device)), None)
    lines = [
        ["network", "B x T", "ms an update", "tokens/s", "TFLOP/s", "share of peak", "predicted ms"]
    ]
    lengths, tokens = ((16, 32), 256) if args.tiny else ((128, 1024, 10_000), 65_536)
    for name, size in (TINY if args.tiny else SIZES).items():
        for steps in lengths:
            rows = max(1, tokens // steps)
            loss, batch = make_parts(size, rows, steps, device)
            products, attention = update_flops(loss, rows, steps)
            update = make_update(loss, batch, args.half, False)
            with Count() as count:
                update()
            dtype = torch.bfloat16 if args.half else torch.float32
            machine = calibrate(device, dtype, rows, steps, size[0], max(1, size[0] // 64))
            predicted = machine.seconds(products, attention, count.bytes, count.launches)
            seconds = seconds_of(make_update(loss, batch, args.half, args.compile), device)
            rate = (products + attention / 2) / seconds
            lines.append([
                name, f"{rows} x {steps}", f"{1e3 * seconds:.2f}", f"{rows * steps / seconds:,.0f}",
                f"{rate / 1e12:.3g}", f"{rate / peak:.1%}" if peak else "", f"{1e3 * predicted:.2f}",
            ])  # fmt: skip
    return table(lines)


def small_update(args: argparse.Namespace, device: torch.device) -> str:
    """Table of the smallest published update, queued operator by operator and compiled."""
    size, rows, steps = ((32, 1, 32), 4, 16) if args.tiny else ((256, 3, 256), 24, 128)
    loss, batch = make_parts(size, rows, steps, device)
    ways = {"operator by operator": False} | ({"compiled": True} if args.compile else {})
    times = {
        name: seconds_of(make_update(loss, batch, args.half, way), device)
        for name, way in ways.items()
    }
    rows_of_table = [[name, f"{1e3 * seconds:.2f}"] for name, seconds in times.items()]
    return table([[f"update of {rows} x {steps}, d {size[0]}", "ms"], *rows_of_table])


def policy_step(args: argparse.Namespace, device: torch.device) -> str:
    """Table of a policy's step in a full context."""
    width, layers, rows, context = (32, 1, 4, 64) if args.tiny else (256, 3, 512, 1024)
    lines = [[f"step of {rows} environments, context {context}, d {width}", "ms", "steps/s"]]
    for name in ("operator by operator", "compiled") if args.compile else ("operator by operator",):
        env = make_trial_env(Toy(ACTIONS["categorical"], rows), horizon=10**6)
        options = {"d_model": width, "num_layers": layers, "num_heads": max(1, width // 64)}
        policy = make_policy(env, context_length=context, seq_model_options=options, device=device)
        if name == "compiled":
            compile_policy(policy)
        step = env.reset().to(device)

        def act(policy=policy, step=step) -> Tensor:
            with torch.autocast(device.type, torch.bfloat16, enabled=args.half):
                policy(step)
            step["is_init"] = torch.zeros_like(step["is_init"])
            return step["action"]

        for _ in range(context + 8):
            act()
        seconds = seconds_of(act, device, rounds=50)
        lines.append([name, f"{1e3 * seconds:.2f}", f"{rows / seconds:,.0f}"])
    return table(lines)


def device_name(device: torch.device) -> str:
    """Name of the device."""
    return (
        torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else platform.processor() or "CPU"
    )


def main(arguments: list[str] | None = None) -> str:
    """Run everything and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="auto")
    parser.add_argument("--tiny", action="store_true", help="sizes of a test")
    parser.add_argument("--no-compile", dest="compile", action="store_false")
    parser.add_argument("--fp32", dest="half", action="store_false")
    args = parser.parse_args(arguments)
    device = pick_device(args.device)
    heading = f"{device_name(device)}, torch {torch.__version__}, {'bf16' if args.half else 'fp32'}"
    parts = [f"**{heading}, {'compiled' if args.compile else 'not compiled'}**"]
    parts += [part(args, device) for part in (updates, small_update, policy_step)]
    text = "\n\n".join(parts)
    sys.stdout.write(f"{text}\n")
    return text


if __name__ == "__main__":
    main()
