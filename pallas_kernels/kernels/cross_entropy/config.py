"""How the parts of a call are sized."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class XlaConfig:
    """How XLA computes it.

    Attributes:
      chunk: tokens of a device whose logits exist at a time.
    """

    chunk: int


@dataclasses.dataclass(frozen=True)
class TpuConfig:
    """Block sizes of the TPU kernels, tokens in multiples of 8 and ids of 128.

    Attributes:
      chunk: tokens whose logits exist at a time when there is a gradient.
      forward_tokens: tokens of a block of logits, whose hidden states stay in VMEM while the head streams by.
      forward_vocabulary: ids of a block of logits.
      backward_tokens: tokens of the blocks in which the gradient of the logits is made; divides `chunk`.
      backward_vocabulary: ids whose gradient stays in VMEM while the tokens of a chunk add to it.
    """

    chunk: int
    forward_tokens: int
    forward_vocabulary: int
    backward_tokens: int
    backward_vocabulary: int
