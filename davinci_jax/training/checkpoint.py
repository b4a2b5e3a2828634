"""Checkpoints that notice damage: Orbax steps, saved asynchronously, sealed, fingerprinted and verified on load."""

from __future__ import annotations

import logging
import pathlib
import shutil
import threading
from typing import Any

import jax
import numpy as np
from orbax.checkpoint import v1 as ocp

from davinci_jax.errors import CheckpointError
from davinci_jax.experiment import CheckpointConfig
from davinci_jax.training.fingerprint import fingerprint
from davinci_jax.training.seal import find_damage, is_sealed, read_meta, sealed_steps, write_seal
from davinci_jax.training.state import TrainState
from davinci_jax.training.trees import describe, nested, steps_on_disk, unnested

_REMOVED = ".removed"


class Checkpoints:
    """The checkpoints of one run directory.

    Args:
      directory: the folder that holds one folder per step.
      config: what is kept.

    A step that is damaged is renamed to `<step>.damaged`, and one whose save was cut off before its seal to
    `<step>.unfinished`, so that nothing is lost and the step can be saved again; `damaged` lists (step, what is wrong)
    and `unfinished` steps. Only steps newer than the newest whole one are looked at: checking is reading, and there may
    be terabytes.
    """

    def __init__(self, directory: str | pathlib.Path, config: CheckpointConfig):
        # Orbax insists on absolute paths and logs every save at length.
        logging.getLogger("absl").setLevel(logging.ERROR)
        self.directory = pathlib.Path(directory).absolute()
        self.directory.mkdir(parents=True, exist_ok=True)
        self.damaged: list[tuple[int, str]] = []
        self.unfinished: list[int] = []
        self._pending: threading.Thread | None = None
        self._failure: tuple[int, BaseException] | None = None
        self._config, self._whole = config, set()
        self._newest_whole()  # before Orbax lists the folder
        self._orbax = _open_orbax(self.directory)

    def steps(self) -> list[int]:
        """Returns the steps with a whole checkpoint, oldest first."""
        return sealed_steps(self.directory)

    def save(self, state: TrainState, meta: dict[str, Any]) -> int:
        """Starts saving the state with `meta` (JSON) and returns its step; waits only for the save before.

        The arrays are copied before it returns, so the state may be donated at once. Call `poll` every step: it
        raises what went wrong in the background.
        """
        self.wait()
        step = int(state.step)
        meta = {**meta, "step": step, "fingerprint": fingerprint(state)}
        try:
            response = self._orbax.save_async(step, nested(state), force=True)
        except Exception as error:
            raise self._write_error(step, error) from error

        def finish() -> None:
            try:
                response.result()
                write_seal(self.directory / str(step), meta)
                self._remove_old()
            except BaseException as error:
                self._failure = (step, error)

        self._pending = threading.Thread(target=finish, name=f"save-{step}")
        self._pending.start()
        return step

    def _remove_old(self) -> None:
        """Removes the steps that are not to be kept: now that the newest has its seal, and not sooner.

        A step loses its name before its files, so a kill on the way leaves nothing that looks like a checkpoint.
        """
        if jax.process_index():
            return
        steps, every = self.steps(), self._config.keep_every
        for step in steps[: -self._config.keep_last]:
            if every is None or step % every:
                (self.directory / str(step)).rename(self.directory / f"{step}{_REMOVED}")
        for folder in self.directory.glob(f"*{_REMOVED}"):
            shutil.rmtree(folder)

    def poll(self) -> None:
        """Raises `CheckpointError` if a save in the background has failed."""
        if self._pending and not self._pending.is_alive():
            self.wait()

    def wait(self) -> None:
        """Waits for the save in the background; raises `CheckpointError` if it failed."""
        if self._pending:
            self._pending.join()
            self._pending = None
        if self._failure:
            (step, error), self._failure = self._failure, None
            raise self._write_error(step, error) from error

    def close(self) -> None:
        """Waits for the last save and closes the folder."""
        try:
            self.wait()
        finally:
            self._close_orbax()

    def _close_orbax(self) -> None:
        try:
            self._orbax.close()
        except Exception as error:
            # A failed save is reported by Orbax once more on closing; `wait` has told it already.
            logging.getLogger(__name__).debug("closing after a failed save: %s", error)

    def restore(self, abstract: TrainState) -> tuple[TrainState, dict[str, Any]] | None:
        """Returns the newest whole state and its meta, or `None` if nothing was ever saved.

        Args:
          abstract: shapes, dtypes and shardings of the state to load into; the mesh may differ from the saved one.

        Raises:
          CheckpointError: every checkpoint is damaged, now or when it was last looked at, or the arrays do not fit
            `abstract`.
        """
        while (step := self._newest_whole()) is not None:
            state, meta, why = self._load(step, abstract)
            if _all_hosts(why is None):
                return state, meta
            self._close_orbax()
            self._set_aside(step, why or "damaged on another host")
            self._orbax = _open_orbax(self.directory)
        aside = sorted(path.name for path in self.directory.glob("*.damaged*"))
        if aside:
            what = "; ".join(f"step {bad}: {why}" for bad, why in self.damaged) or ", ".join(aside)
            raise CheckpointError(
                str(self.directory),
                None,
                f"holds no whole checkpoint ({what})",
                "bring one back from a copy, or remove the damaged ones to start anew",
            )
        return None

    def _load(self, step: int, abstract: TrainState) -> tuple[TrainState, dict[str, Any], str | None]:
        """Returns the state, its meta, and what is wrong with it, if anything."""
        self._check_fits(step, abstract)
        meta = read_meta(self.directory / str(step))
        state = unnested(abstract, self._orbax.load(step, nested(abstract)))
        loaded = fingerprint(state)
        wrong = [name for name, value in meta["fingerprint"].items() if loaded.get(name) != value]
        return state, meta, f"array {wrong[0]} is not what was saved" if wrong else None

    def _check_fits(self, step: int, abstract: TrainState) -> None:
        """Raises with the names that differ; Orbax casts dtypes silently and reports shapes in riddles."""
        saved = describe(self._orbax.metadata(step).metadata)
        wanted = describe(nested(abstract))
        lines = [
            f"{name}: saved {saved.get(name, 'nothing')}, wanted {wanted.get(name, 'nothing')}"
            for name in sorted(saved.keys() | wanted.keys())
            if saved.get(name) != wanted.get(name)
        ]
        if lines:
            more = f" and {len(lines) - 4} more" if len(lines) > 4 else ""
            raise CheckpointError(
                f"{self.directory}/{step}",
                None,
                f"does not fit this model ({'; '.join(lines[:4])}{more})",
                "use the experiment.json of the run that wrote it",
            )

    def _newest_whole(self) -> int | None:
        """Returns the newest step that is whole on all hosts; those above it are set aside."""
        for step in reversed(steps_on_disk(self.directory)):
            folder = self.directory / str(step)
            if step in self._whole:
                return step
            if not _all_hosts(is_sealed(folder)):
                self._set_aside(step, None)
                continue
            why = find_damage(folder)
            if _all_hosts(why is None):
                self._whole.add(step)
                return step
            self._set_aside(step, why or "damaged on another host")
        return None

    def _set_aside(self, step: int, why: str | None) -> None:
        """Renames a damaged step, or one that was never finished (`why` is `None`); all hosts wait for it."""
        folder = self.directory / str(step)
        self._whole.discard(step)
        if why is None:
            self.unfinished.append(step)
        else:
            self.damaged.append((step, why))
        if jax.process_index() == 0:
            folder.rename(_free_name(folder.with_suffix(".unfinished" if why is None else ".damaged")))
        _all_hosts(True)

    def _write_error(self, step: int, error: BaseException) -> CheckpointError:
        whole = self.steps()
        kept = f"step {whole[-1]} is whole" if whole else "there is no older one"
        reason = " ".join(str(error).split())[:200]
        return CheckpointError(
            f"{self.directory}/{step}",
            None,
            f"could not be written ({reason}); {kept}",
            "free or mend the disk and start the same command again",
        )


def _open_orbax(directory: pathlib.Path) -> ocp.training.Checkpointer:
    """Orbax saves when told to and removes nothing: it would remove an old step before the new one has its seal."""
    context = ocp.Context()
    # Measured: zstd makes saves 6 to 8 times slower for 7 % of the size.
    context.array.saving.use_compression = False
    return ocp.training.Checkpointer(
        directory,
        context=context,
        cleanup_tmp_directories=True,
        preservation_policy=ocp.training.preservation_policies.PreserveAll(),
    )


def _free_name(path: pathlib.Path) -> pathlib.Path:
    """Returns `path`, or `path` with the first number that is free."""
    candidates = [path, *(path.with_name(f"{path.name}.{n}") for n in range(2, 1000))]
    return next(candidate for candidate in candidates if not candidate.exists())


def _all_hosts(ok: bool) -> bool:
    if jax.process_count() == 1:
        return ok
    from jax.experimental import multihost_utils

    return bool(np.all(multihost_utils.process_allgather(np.array([ok]))))
