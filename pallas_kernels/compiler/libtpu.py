"""Environment of libtpu: quiet, usable by several processes at once, and writing out the schedules it makes."""

import atexit
import functools
import os
import pathlib
import shutil
import tempfile

_PASSES = "hlo-static-bundle-profile|region-expansion|final_bundles"
_ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    # Without it a second process that loads libtpu aborts on /tmp/libtpu_lockfile.
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5p-8",
    "TPU_MIN_LOG_LEVEL": "3",
    "TPU_STDERR_LOG_LEVEL": "3",
    "TPU_LOG_DIR": "disabled",
}


@functools.cache
def prepare() -> None:
    """Sets the environment that libtpu reads when it is loaded, which is once in a process; what is set stays."""
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    folder = dumps()
    flags = (
        f"--xla_jf_dump_to={folder}",
        "--xla_jf_dump_llo_text=true",
        f"--xla_jf_dump_llo_pass_label_regex=.*({_PASSES}).*",
    )
    os.environ["LIBTPU_INIT_ARGS"] = " ".join((os.environ.get("LIBTPU_INIT_ARGS", ""), *flags)).strip()


@functools.cache
def dumps() -> pathlib.Path:
    """The folder that libtpu writes to in this process; it is removed when the process ends."""
    folder = pathlib.Path(tempfile.mkdtemp(prefix="pallas_kernels_"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def clear_dumps() -> None:
    """Removes what libtpu has written, before the next compilation."""
    for file in dumps().iterdir():
        file.unlink()
