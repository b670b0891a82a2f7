"""What can go wrong, as one family.

Every error names the thing, what was expected, what came and what to do. ``code`` is the stable word that scripts match
on and the command line prints; ``exit_code`` is the process's exit status. Each class is also the built-in exception
that a caller who never heard of this package would catch.
"""

from __future__ import annotations


class RyzenCompileError(Exception):
    """Base of the family. ``message`` says what, where, expected and got; ``hint`` says what to do."""

    code = "internal"
    exit_code = 70

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message}; {self.hint}" if self.hint else self.message


class UsageError(RyzenCompileError, ValueError):
    """Arguments that contradict each other or are outside their range."""

    code, exit_code = "usage", 2


class ConfigError(RyzenCompileError, ValueError):
    """A recipe, configuration file or model configuration that cannot be used."""

    code, exit_code = "config", 3


class ModelError(RyzenCompileError, ValueError):
    """A model directory or its weights are missing something, damaged, or contain NaN."""

    code, exit_code = "model", 3


class CaptureError(RyzenCompileError, ValueError):
    """``torch.export`` could not trace the model."""

    code, exit_code = "capture", 3


class UnsupportedError(RyzenCompileError, NotImplementedError):
    """The graph computes something that a pass or backend cannot carry; names the node and its module path."""

    code, exit_code = "unsupported", 3


class ArtifactError(RyzenCompileError, ValueError):
    """An artifact directory is incomplete, of another schema, or not one of ours."""

    code, exit_code = "artifact", 3


class PromptError(RyzenCompileError, ValueError):
    """A prompt or a generation argument is out of range."""

    code, exit_code = "prompt", 3


class NumericalError(RyzenCompileError, ArithmeticError):
    """Logits became NaN or infinite while generating."""

    code, exit_code = "numerical", 3


class UnsafeError(RyzenCompileError, PermissionError):
    """Refused because it could run code or leave its directory: pickle, remote code, links, ``..``."""

    code, exit_code = "unsafe", 4


class TamperedError(RyzenCompileError, ValueError):
    """A file's size or SHA-256 is not what the manifest says."""

    code, exit_code = "tampered", 4


class ResourceError(RyzenCompileError, OSError):
    """Out of disk, out of memory, or an I/O error."""

    code, exit_code = "resource", 5


class MemoryLimitError(ResourceError, MemoryError):
    """A request needs more memory than its budget; raised before anything is allocated."""

    code, exit_code = "memory", 5


class BusyError(RyzenCompileError, RuntimeError):
    """Another process holds the lock on the same output."""

    code, exit_code = "busy", 6


class ParityError(RyzenCompileError, AssertionError):
    """The rewritten model left its error budget and no roll-back was possible."""

    code, exit_code = "parity", 7


class PassError(RyzenCompileError, RuntimeError):
    """A pass broke the IR's law; names the pass and those that ran before it."""

    code, exit_code = "pass", 70
