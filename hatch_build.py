"""The build hook: compiles the modules of the hot path with mypyc if that is possible here. See docs/design.md."""

from __future__ import annotations

import os
import platform
import shlex
import shutil
import sys
import sysconfig
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

# In the environment. "1": compile nothing. "0": fail if it is not possible. Otherwise modules that can't be compiled
# are used as they are.
SWITCH = "TRANSOCKS_PURE"
# Where mypy and what it needs have wheels. Elsewhere pip would have to build them, from Rust among others.
_MACHINES = {"x86_64", "aarch64"}
_PYTHONS = range(11, 16)
# Of all modules in one shared library, as calls between them are then calls of C functions.
_LIBRARY = "transocks"


class BuildHook(BuildHookInterface[Any]):
    """Adds the compiled modules to a wheel, beside their sources. An editable wheel stays interpreted."""

    def dependencies(self) -> list[str]:
        """What a build requires beside hatchling: nothing where it can't compile anyway."""
        return [] if _obstacle() else list(self.config["compiling-requires"])

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Compile."""
        if version == "editable":
            return
        obstacle = _obstacle()
        if obstacle is None:
            self._folder = tempfile.TemporaryDirectory(prefix="transocks-build-")
            obstacle = self._compile(Path(self._folder.name), build_data)
        if obstacle is None:
            return
        if os.environ.get(SWITCH) == "0":
            raise RuntimeError(f"{SWITCH}=0, but the modules could not be compiled: {obstacle}")
        self.app.display_warning(f"nothing is compiled, so both daemons run interpreted, and slower: {obstacle}")

    def finalize(self, version: str, build_data: dict[str, Any], artifact_path: str) -> None:
        """The wheel is written."""
        if hasattr(self, "_folder"):
            self._folder.cleanup()

    def _compile(self, folder: Path, build_data: dict[str, Any]) -> str | None:
        """Compile the modules to `folder`, and have them included. Returns what prevents it."""
        try:
            import mypyc  # noqa: PLC0415
            from mypyc.build import mypycify  # noqa: PLC0415
            from setuptools import Distribution  # noqa: PLC0415
            from setuptools.command.build_ext import build_ext  # noqa: PLC0415
        except ImportError as error:
            return str(error)

        class Build(build_ext):
            """Compiles the files of an extension at the same time."""

            def build_extensions(self) -> None:
                one_after_the_other = self.compiler.compile

                def compile(sources: list[str], **options: Any) -> list[str]:
                    with ThreadPoolExecutor(os.cpu_count()) as pool:
                        made = pool.map(lambda source: one_after_the_other([source], **options), sources)
                        return [file for files in made for file in files]

                self.compiler.compile = compile
                super().build_extensions()

        # Types are checked elsewhere. Here not even all the libraries are installed.
        options = ["--config-file=", "--ignore-missing-imports", f"--cache-dir={folder / 'cache'}"]
        try:
            extensions = mypycify(
                [*options, *self.config["modules"]],
                debug_level="1",  # lines, for gdb and perf
                group_name=_LIBRARY,
                multi_file=True,  # half the compiler's time of one large file, and several go at a time
                target_dir=str(folder / "c"),
            )
            # The same bytes wherever it is built: debugging information has no names of temporary folders.
            temporary = (folder, Path.cwd(), Path(mypyc.__file__).parents[1])
            places = [f"-ffile-prefix-map={each}=." for each in temporary]
            for extension in extensions:
                flags = [each for each in extension.extra_compile_args if each != "-Werror"]
                extension.extra_compile_args = [*flags, *places]
            build = Build(Distribution({"name": _LIBRARY, "ext_modules": extensions}))
            build.build_lib, build.build_temp = str(folder / "lib"), str(folder / "objects")
            build.ensure_finalized()
            build.run()
        except (Exception, SystemExit) as error:  # mypy and mypyc exit; their output says more
            return f"{type(error).__name__}: {error}"
        for file in (folder / "lib").rglob("*.so"):
            build_data["force_include"][str(file)] = str(file.relative_to(folder / "lib"))
        build_data["infer_tag"], build_data["pure_python"] = True, False
        return None


def _obstacle() -> str | None:
    """What prevents compiling here, as far as that is known without trying."""
    switch = os.environ.get(SWITCH)
    if switch == "1":
        return f"{SWITCH}=1"
    compiler = shlex.split(os.environ.get("CC") or sysconfig.get_config_var("CC") or "cc")[0]
    if shutil.which(compiler) is None:
        return f"no C compiler, {compiler} (Debian: gcc and libc6-dev)"
    headers = Path(sysconfig.get_path("include"))
    if not (headers / "Python.h").exists():
        return f"no Python.h in {headers} (Debian: python3-dev)"
    if switch != "0" and not _has_wheels():
        return f"mypy has no wheels for {sys.implementation.name} {platform.python_version()} on this machine"
    return None


def _has_wheels() -> bool:
    return (
        sys.implementation.name == "cpython"
        and sys.version_info[0] == 3
        and sys.version_info[1] in _PYTHONS
        and platform.machine() in _MACHINES
        and platform.libc_ver()[0] == "glibc"
    )
