"""Whether a release could be made: `./run release`.

Builds sdist and wheel into dist/, has twine look at them and render the README, compares the sdist with git,
installs the wheel into an empty environment and runs the README's quick start there.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import venv
from pathlib import Path

from fictive.testing import postgres

ROOT = Path(__file__).resolve().parent.parent
TRY = """
with app.app_context():
    db.session.add(Thing(id=1, name="first"))
    db.session.commit()
client = app.test_client()
assert client.patch("/things/1", json={"name": "second"}).json == {"id": 1, "name": "second", "edits": 1}
assert client.get("/things/1").json == {"id": 1, "name": "second", "edits": 1}
import fictive
from importlib.metadata import version
assert fictive.__version__ == version("fictive"), fictive.__version__
"""


def main() -> int:
    dist = ROOT / "dist"
    shutil.rmtree(dist, ignore_errors=True)
    subprocess.run([sys.executable, "-m", "build", "--outdir", dist, ROOT], check=True, stdout=subprocess.DEVNULL)
    (wheel,), (sdist,) = dist.glob("*.whl"), dist.glob("*.tar.gz")
    subprocess.run([sys.executable, "-m", "twine", "check", "--strict", wheel, sdist], check=True)
    with tarfile.open(sdist) as archive:
        packed = {name.partition("/")[2] for name in archive.getnames()}
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True).stdout
    if missing := set(tracked.splitlines()) - packed:
        print(f"not in the sdist: {', '.join(sorted(missing))}", file=sys.stderr)
        return 1
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    quick_start = re.search(r"<!-- quick-start -->\n```python\n(.*?)```", readme, re.DOTALL)
    assert quick_start is not None
    with tempfile.TemporaryDirectory() as directory, postgres.server() as server:
        venv.create(directory, with_pip=True)
        python = Path(directory, "bin", "python")
        pip = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", f"{wheel}[psycopg2]"]
        variables = {**os.environ, "DATABASE_URL": server.url(driver="psycopg2")}
        variables.pop("PYTHONPATH", None)
        subprocess.run(pip, env=variables, check=True)
        program = quick_start[1] + TRY
        subprocess.run([python, "-W", "error", "-c", program], cwd=directory, env=variables, check=True)
    print(f"{wheel.name} and {sdist.name} can be released: the README's quick start runs on the wheel")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
