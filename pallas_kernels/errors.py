"""The errors of this package: a wrong argument, and a case that a kernel does not take."""


class ArgumentError(ValueError):
    """A wrong argument, found at trace time.

    Attributes:
      argument: the name of the argument.
    """

    def __init__(self, function: str, argument: str, problem: str, remedy: str = ""):
        self.argument = argument
        super().__init__(f"{function}: `{argument}` {problem}" + (f"; {remedy}" if remedy else ""))


class UnsupportedError(NotImplementedError):
    """A case that the chosen backend has no kernel for.

    Attributes:
      reason: what the kernel lacks, as `supported` gives it.
    """

    def __init__(self, function: str, backend: str, reason: str):
        self.reason = reason
        super().__init__(
            f'{function}: backend="{backend}" does not take this case: {reason}; use backend="xla", '
            f'or "auto", which falls back by itself'
        )
