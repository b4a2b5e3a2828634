"""How the parts of a call are sized."""

import dataclasses

from pallas_kernels.arguments import is_integer


@dataclasses.dataclass(frozen=True)
class XlaCrossEntropyConfig:
    """How XLA computes it.

    Attributes:
      chunk: tokens of a device whose logits exist at a time.
    """

    chunk: int

    def wrong(self) -> str | None:
        """What must change for the sizes to be right; None if they are."""
        return None if is_integer(self.chunk) and self.chunk > 0 else "give a positive chunk"


@dataclasses.dataclass(frozen=True)
class TpuCrossEntropyConfig:
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

    def wrong(self) -> str | None:
        """What must change for the sizes to be right; None if they are."""
        tokens = self.chunk, self.forward_tokens, self.backward_tokens
        ids = self.forward_vocabulary, self.backward_vocabulary
        if not all(is_integer(size) and size > 0 for size in (*tokens, *ids)):
            return "give positive integers"
        if any(size % 8 for size in tokens) or any(size % 128 for size in ids):
            return "give tokens in multiples of 8 and ids in multiples of 128"
        return "give backward_tokens that divide chunk" if self.chunk % self.backward_tokens else None


CrossEntropyConfig = XlaCrossEntropyConfig | TpuCrossEntropyConfig
