"""What gradients of their own save RMSNorm, SwiGLU and rotary embeddings, by the programs that XLA makes of them.

  PYTHONPATH=. JAX_PLATFORMS=cpu python benchmarks/elementwise_static.py [--device v5p ...] [--tokens 4096]

needs the compilers of the extra `aot` and no accelerator. For each function, as this package has it and as jnp with
automatic differentiation, it counts in bytes for each element of the first argument: what the forward pass keeps for
the backward pass beside the arguments; what the fusions of both passes read and write; and the least any kernel can
move. The last lines do the same for a layer's MLP with its norm, where fusion goes on into the products.
"""

import argparse
import math
import re

import jax
import jax.numpy as jnp

from pallas_kernels import rms_norm, rope, swiglu
from pallas_kernels.compiler import aot

HIDDEN, INNER, HEADS, HEAD = 2048, 11008, 16, 128
BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "f32": 4, "s32": 4, "u32": 4}
FREE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "copy-done", "partition-id", "iota"}


def plain_rms_norm(x, scale):
    wide = x.astype(jnp.float32)
    return (wide * jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + 1e-6) * scale).astype(x.dtype)


def plain_swiglu(gate, up):
    return (jax.nn.silu(gate.astype(jnp.float32)) * up.astype(jnp.float32)).astype(gate.dtype)


def plain_rope(x, cos, sin):
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    cos, sin = cos[..., None, :], sin[..., None, :]
    return jnp.concatenate((first * cos - second * sin, second * cos + first * sin), axis=-1).astype(x.dtype)


def mlp(norm, activation):
    def layer(x, scale, gate, up, down):
        normed = norm(x, scale)
        return x + activation(normed @ gate, normed @ up) @ down

    return layer


def cases(tokens):
    """name -> (ours, plain, arguments, how many of them have a gradient)."""

    def bf16(*shape):
        return jax.ShapeDtypeStruct(shape, jnp.bfloat16)

    def f32(*shape):
        return jax.ShapeDtypeStruct(shape, jnp.float32)

    table = f32(1, tokens, HEAD // 2)
    weights = bf16(HIDDEN, INNER), bf16(HIDDEN, INNER), bf16(INNER, HIDDEN)
    return {
        "rms_norm": (rms_norm, plain_rms_norm, (bf16(tokens, HIDDEN), f32(HIDDEN)), 2),
        "swiglu": (swiglu, plain_swiglu, (bf16(tokens, INNER), bf16(tokens, INNER)), 2),
        "rope": (rope, plain_rope, (bf16(1, tokens, HEADS, HEAD), table, table), 1),
        "norm and MLP": (
            mlp(rms_norm, swiglu),
            mlp(plain_rms_norm, plain_swiglu),
            (bf16(tokens, HIDDEN), f32(HIDDEN), *weights),
            5,
        ),
    }


def passes(function, arguments, differentiated):
    """(forward, backward, arguments of the backward pass, those kept that are none of the forward, those that are)."""
    fixed = list(range(differentiated, len(arguments)))

    def pullback(*arrays):
        return jax.vjp(lambda *some: function(*some, *(arrays[i] for i in fixed)), *arrays[:differentiated])

    traced, (out, tree) = jax.make_jaxpr(pullback, return_shape=True)(*arguments)
    leaves, structure = jax.tree.flatten(tree)
    places = {id(var): i for i, var in enumerate(traced.jaxpr.invars)}
    given = [places.get(id(var)) for var in traced.jaxpr.outvars[1:]]  # an argument is kept without a copy
    own = [leaf for leaf, place in zip(leaves, given, strict=True) if place is None]

    def forward(*arrays):
        out, tree = pullback(*arrays)
        return out, [leaf for leaf, place in zip(jax.tree.leaves(tree), given, strict=True) if place is None]

    def backward(dout, own, *arrays):
        own = iter(own)
        leaves = [next(own) if place is None else arrays[place] for place in given]
        return jax.tree.unflatten(structure, leaves)(dout)

    again = [arguments[place] for place in sorted({place for place in given if place is not None})]
    return forward, backward, (out, own, *arguments), own, again


def moved(text):
    """Bytes that the instructions of the entry computation read and write in the device's memory."""
    entry = text[text.index("\nENTRY ") :].splitlines()
    total, types = 0, {}
    for line in entry:
        found = re.match(r"\s+(?:ROOT )?%?([\w.\-]+) = (.*?[\])}]) ([\w-]+)\((.*?)\)", line)
        if not found:
            continue
        name, type_, operation, operands = found.groups()
        types[name] = size(type_)
        if operation not in FREE:
            total += types[name] + sum(types.get(x, 0) for x in re.findall(r"%([\w.\-]+)", operands))
    return total


def size(type_):
    """Bytes of an array or of a tuple of them, but for arrays in memory space 1, which is on the chip."""
    arrays = re.findall(r"\b([a-z]+\d*)\[([\d,]*)\](\{[^}]*\})?", type_)
    return sum(
        BYTES.get(dtype, 0) * math.prod(int(n) for n in shape.split(",") if n)
        for dtype, shape, layout in arrays
        if "S(1)" not in layout
    )


def least(arrays):
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(arrays))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", nargs="+", default=["v5p", "v6e", "h200"])
    parser.add_argument("--function", nargs="+", help="some of them")
    parser.add_argument("--tokens", type=int, default=4096)
    options = parser.parse_args()
    print(f"| device | function ({options.tokens} tokens) | gradient | kept | forward | backward | at least |")
    print("|---|---|---|---|---|---|---|")
    for device in options.device:
        for name, (ours, plain, arguments, differentiated) in cases(options.tokens).items():
            if name not in (options.function or [name]):
                continue
            least_ = bounds(*passes(ours, arguments, differentiated)[2:], arguments, differentiated)
            for kind, function in (("own", ours), ("automatic", plain)):
                figures = row(device, function, arguments, differentiated)
                cells = [f"{x / arguments[0].size:.2f}" for x in figures]
                cells.append(" + ".join(f"{x / arguments[0].size:.2f}" for x in least_))
                print(f"| {device} | {name} | {kind} | " + " | ".join(cells) + " |", flush=True)


def row(device, function, arguments, differentiated):
    """Bytes kept, and moved forward and backward."""
    forward, backward, inputs, own, _ = passes(function, arguments, differentiated)
    programs = (forward, arguments), (backward, inputs)
    return least(own), *(moved(aot.compile_for(device, run, *given).text) for run, given in programs)


def bounds(inputs, own, again, arguments, differentiated):
    """What any kernel reads and writes forward, and backward."""
    out, gradients = inputs[0], arguments[:differentiated]
    return least((arguments, out, own)), least((out, own, again, gradients))


if __name__ == "__main__":
    main()
