"""Training tokens/s on this CPU: the decoder against Qwen2 of `transformers` with torch, taken in turns.

Both sides hold the same weights, take the same batch, and run forward, backward and AdamW in float32 on the same
cores. Rounds alternate. Two ratios are reported: of wall time, over the rounds in which other processes left the
machine alone (other load hurts torch's OpenMP threads, which wait for each other, more than XLA's); and of the
processor time that a step takes, which other load hardly changes with `--cores 1`, where no thread waits.

The allocator's settings count, for both sides: by default glibc gives a step's buffers back to the system, and the
next step faults them in again.

  export MALLOC_ARENA_MAX=1 MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=100000000000
  python benchmarks/training_cpu.py --cores 2 --output benchmarks/results/training_cpu_2_cores.json
  python benchmarks/training_cpu.py --cores 1 --output benchmarks/results/training_cpu_1_core.json
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import pathlib
import platform
import statistics
import sys
import time

os.environ.setdefault("JAX_PLATFORMS", "cpu")
if "--cores" in sys.argv:  # before any thread pool is sized
    os.sched_setaffinity(0, range(int(sys.argv[sys.argv.index("--cores") + 1])))

import jax
import jax.numpy as jnp
import numpy as np
import optax
import torch
import transformers

from davinci_jax import sharding
from davinci_jax.experiment import MeshConfig, ModelConfig
from davinci_jax.models import decoder as decoders
from davinci_jax.models import flops

ADAMW = {"lr": 1e-4, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}


def model_config(args: argparse.Namespace) -> ModelConfig:
    """The model of both sides."""
    return ModelConfig(
        vocab_size=args.vocab,
        hidden_size=args.hidden,
        num_layers=args.layers,
        num_heads=args.heads,
        num_kv_heads=args.kv_heads,
        head_size=args.hidden // args.heads,
        mlp_size=3 * args.hidden,
        max_positions=args.length,
        compute_dtype="float32",
        remat="none",
        loss_chunk=args.batch * args.length,
    )


class Jax:
    """The decoder of this project, one jitted step with donated state."""

    def __init__(self, config: ModelConfig, tokens: np.ndarray):
        jax.set_mesh(sharding.make_mesh(MeshConfig()))
        (b1, b2), lr = ADAMW["betas"], ADAMW["lr"]
        self.optimizer = optax.adamw(lr, b1, b2, ADAMW["eps"], weight_decay=ADAMW["weight_decay"])
        self.model = decoders.build(config, jax.random.key(0))
        self.opt_state = jax.jit(self.optimizer.init)(self.model)
        labels = np.concatenate((tokens[:, 1:], np.full((len(tokens), 1), -1)), axis=1)
        segments, positions = np.ones_like(tokens), np.broadcast_to(np.arange(tokens.shape[1]), tokens.shape)
        self.batch = [jnp.asarray(x, jnp.int32) for x in (tokens, labels, segments, positions)]
        self.jitted = jax.jit(self._step, donate_argnums=(0, 1))

    def _step(self, model, opt_state, *batch):
        def loss(model):
            return decoders.training_loss(model, *batch)[0] / (batch[1] >= 0).sum()

        value, grads = jax.value_and_grad(loss)(model)
        updates, opt_state = self.optimizer.update(grads, opt_state, model)
        return optax.apply_updates(model, updates), opt_state, value

    def step(self) -> float:
        self.model, self.opt_state, value = self.jitted(self.model, self.opt_state, *self.batch)
        return float(value)


class Torch:
    """Qwen2 of `transformers` with its own loss, attention by scaled_dot_product_attention, `torch.optim.AdamW`."""

    def __init__(self, model: decoders.Decoder, tokens: np.ndarray):
        c = model.config
        config = transformers.Qwen2Config(
            vocab_size=c.vocab_size,
            hidden_size=c.hidden_size,
            intermediate_size=c.mlp_size,
            num_hidden_layers=c.num_layers,
            num_attention_heads=c.num_heads,
            num_key_value_heads=c.num_kv_heads,
            max_position_embeddings=c.max_positions,
            rms_norm_eps=c.norm_eps,
            rope_parameters={"rope_type": "default", "rope_theta": c.rope_base},
            tie_word_embeddings=True,
            use_cache=False,
            attn_implementation="sdpa",
        )
        self.model = transformers.Qwen2ForCausalLM(config).train()
        self.model.load_state_dict(_qwen2_weights(model), strict=False)
        self.model.tie_weights()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), **ADAMW, fused=True)
        self.tokens = torch.from_numpy(tokens)

    def step(self) -> float:
        loss = self.model(input_ids=self.tokens, labels=self.tokens).loss
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.item()


def _qwen2_weights(model: decoders.Decoder) -> dict[str, torch.Tensor]:
    def tensor(x):
        return torch.from_numpy(np.array(x))

    attention, mlp, blocks = model.blocks.attention, model.blocks.mlp, model.blocks
    weights = {"model.embed_tokens.weight": model.embed[...], "model.norm.weight": model.final_norm.scale[...]}
    for i in range(model.config.num_layers):
        at = f"model.layers.{i}."
        for name in ("q", "k", "v"):
            matrix, bias = getattr(attention, f"{name}_proj")[i], getattr(attention, f"{name}_bias")[i]
            weights[f"{at}self_attn.{name}_proj.weight"] = matrix.reshape(len(matrix), -1).T
            weights[f"{at}self_attn.{name}_proj.bias"] = bias.reshape(-1)
        weights[f"{at}self_attn.o_proj.weight"] = attention.o_proj[i].reshape(-1, model.config.hidden_size).T
        for name in ("gate", "up", "down"):
            weights[f"{at}mlp.{name}_proj.weight"] = getattr(mlp, name)[i].T
        weights[f"{at}input_layernorm.weight"] = blocks.attention_norm.scale[i]
        weights[f"{at}post_attention_layernorm.weight"] = blocks.mlp_norm.scale[i]
    return {name: tensor(value) for name, value in weights.items()}


def measure(side: Jax | Torch, steps: int) -> dict[str, float]:
    """Wall and processor seconds per step, and how many cores other processes kept busy meanwhile."""
    wall, own, busy = time.perf_counter(), time.process_time(), _busy_seconds()
    for _ in range(steps):
        side.step()
    wall, own, busy = time.perf_counter() - wall, time.process_time() - own, _busy_seconds() - busy
    return {"wall_seconds": wall / steps, "processor_seconds": own / steps, "others_cores": (busy - own) / wall}


def _busy_seconds() -> float:
    """Processor seconds all processes of this machine have used since it started (Linux)."""
    user, nice, system, _, _, *interrupts = pathlib.Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:8]
    return sum(map(int, (user, nice, system, *interrupts))) / os.sysconf("SC_CLK_TCK")


def compare(sides: tuple[Jax, Torch], rounds: int, steps: int) -> list[dict]:
    """Measures the sides in turns."""
    results = []
    for _ in range(rounds):
        ours, theirs = (measure(side, steps) for side in sides)
        ratios = {key: theirs[key] / ours[key] for key in ("wall_seconds", "processor_seconds")}
        others = max(ours["others_cores"], theirs["others_cores"])
        results.append({"jax": ours, "torch": theirs, "ratio": ratios, "others_cores": others})
        seconds = f"jax {ours['wall_seconds']:.3f} s  torch {theirs['wall_seconds']:.3f} s"
        print(f"{seconds}  ratio {ratios['wall_seconds']:.2f}  others {others:.2f} cores", flush=True)
    return results


def summary(results: list[dict], quiet: float, tokens: int) -> dict[str, float | int | None]:
    """Medians; those of wall time over rounds in which others kept fewer than `quiet` cores busy."""
    calm = [entry for entry in results if entry["others_cores"] < quiet]
    summed = {
        "processor_time_ratio": statistics.median(entry["ratio"]["processor_seconds"] for entry in results),
        "quiet_rounds": len(calm),
    }
    if calm:
        summed["wall_time_ratio"] = statistics.median(entry["ratio"]["wall_seconds"] for entry in calm)
        for side in ("jax", "torch"):
            seconds = statistics.median(entry[side]["wall_seconds"] for entry in calm)
            summed[f"{side}_tokens_per_second"] = tokens / seconds
    return summed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sizes = {"hidden": 256, "layers": 6, "heads": 4, "kv_heads": 2, "vocab": 4096, "length": 512, "batch": 8}
    for name, value in {**sizes, "rounds": 7, "steps": 2, "cores": os.cpu_count()}.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=value)
    parser.add_argument("--quiet", type=float, default=0.15, help="most cores others may keep busy in a quiet round")
    parser.add_argument("--output", type=pathlib.Path, help="JSON file to write")
    args = parser.parse_args()

    torch.set_num_threads(args.cores)
    config = model_config(args)
    tokens = np.random.default_rng(0).integers(0, args.vocab, (args.batch, args.length))
    ours = Jax(config, tokens)
    sides = (ours, Torch(ours.model, tokens))
    losses = [[side.step() for side in sides] for _ in range(3)]  # warm-up, and proof that both train the same model
    rounds = compare(sides, args.rounds, args.steps)
    result = {
        "command": " ".join(["python", *sys.argv]),
        "summary": summary(rounds, args.quiet, args.batch * args.length),
        "sizes": {name: getattr(args, name) for name in sizes},
        "parameters": flops.num_params(config),
        "gflops_per_step": args.batch * args.length * flops.flops_per_token(config, args.length) / 1e9,
        "first_losses_jax_torch": losses,
        "rounds": rounds,
        "environment": {
            name: value for name, value in os.environ.items() if name.startswith(("MALLOC_", "XLA_", "OMP_"))
        },
        "machine": {"cpu": _cpu(), "cores": args.cores, "load_average": os.getloadavg()},
        "versions": {
            "python": platform.python_version(),
            **{name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "flax", "torch", "transformers")},
        },
    }
    print(json.dumps({key: result[key] for key in ("summary", "first_losses_jax_torch")}, indent=1))
    if args.output:
        args.output.write_text(json.dumps(result, indent=1) + "\n")


def _cpu() -> str:
    lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines() if os.path.exists("/proc/cpuinfo") else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


if __name__ == "__main__":
    main()
