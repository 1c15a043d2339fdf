"""Hold a wheel and a source archive to what they must hold, and the installed wheel to its commands.

Run:  python .ci/check_package.py DIST  with the archives in DIST, in an environment that has the wheel and nothing else
of this repository.
"""

import importlib.metadata
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[1]


def main() -> None:
    (wheel,), (source,) = Path(sys.argv[1]).glob("*.whl"), Path(sys.argv[1]).glob("*.tar.gz")
    version = importlib.metadata.version("lit-sparse")
    assert version in wheel.name, (version, wheel.name)
    assert version in source.name, (version, source.name)

    names = zipfile.ZipFile(wheel).namelist()
    configs = {path.relative_to(ROOT).as_posix() for path in (ROOT / "configs").rglob("*.yaml")}
    modules = {path.relative_to(ROOT).as_posix() for path in (ROOT / "lit_sparse").rglob("*.py")}
    assert configs
    missing = ({f"lit_sparse/{name}" for name in configs} | modules | {"lit_sparse/py.typed"}) - set(names)
    assert not missing, missing
    own = {name for name in names if not name.startswith(("lit_sparse/", f"lit_sparse-{version}.dist-info/"))}
    assert not own, own
    assert any(name.endswith("licenses/LICENSE") for name in names), names

    with tarfile.open(source) as archive:
        held = {name.partition("/")[2] for name in archive.getnames()}
    assert modules | {"pyproject.toml", "README.md", "LICENSE"} <= held, modules - held

    import lit_sparse

    where = Path(lit_sparse.__file__).parent
    assert where.is_relative_to(sysconfig.get_path("purelib")), where
    assert lit_sparse.__version__ == version
    with tempfile.TemporaryDirectory() as folder:
        for program in ("lightning", "lit-sparse"):
            command = [str(Path(sys.executable).with_name(program)), "fit", "--quiet"]
            command += ["--config", "lit_sparse://quickstart.yaml", "--trainer.max_steps", "2"]
            command += ["--trainer.limit_val_batches", "1"]
            done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
            assert done.returncode == 0, done.stderr
            assert not done.stdout.strip(), done.stdout
        assert len(list(Path(folder).rglob("last.ckpt"))) == 2
    print(f"{wheel.name}: {len(names)} files, {source.name}: {len(held)}; the commands work.")


if __name__ == "__main__":
    main()
