"""Test that ``python -m tests.structure`` finds broken rules in small source trees."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.structure import main

LONG = '"""One.\n\n' + "    Line.\n" * 90 + '    """\n'  # a docstring, which doesn't count
SOUND = {
    "launch.py": "from isobatch.trainers.run import train\n",
    "isobatch/__init__.py": "from isobatch.launch import main\n",
    "conf/schema.py": "from isobatch.scaling import units\n",
    "conf/compose.py": "import isobatch.conf.schema\nimport torch, os\n",
    "scaling/units.py": "",
    "scaling/rules.py": "from isobatch.scaling.units import Duration\n",
    "slurm/render.py": "",
    "slurm/submit.py": f"def submit(a, b, c, d, *, e, f, g, h):\n    {LONG}" + "    pass\n" * 49,
    "trainers/run.py": "class Run:\n    def train(self, a, b, c, d, e, f, g, h): ...\n",
    "trainers/loop/fit.py": "",
    "trainers/loop/metrics.py": "from isobatch.trainers.loop.fit import fit\n",
}
LAUNCH = ("trainers/launch/a.py", "trainers/launch/b.py")
WRONG = {
    "an import of a higher layer": (
        {"scaling/units.py": "def parse():\n    from isobatch.conf.schema import Duration\n"},
        "scaling/units.py imports conf/schema.py, which is above it",
    ),
    "an import only for the type checker": (
        {"trainers/loop/fit.py": "if TYPE_CHECKING:\n    import isobatch.trainers.run\n"},
        "trainers/loop/fit.py imports trainers/run.py, which is above it",
    ),
    "an import of a folder on the same level": (
        {"slurm/render.py": "import isobatch.trainers.launch.a\n"} | dict.fromkeys(LAUNCH, ""),
        "slurm/render.py imports trainers/launch/a.py, which is above it",
    ),
    "an import by name": (
        {"conf/compose.py": 'import importlib\n\nimportlib.import_module("isobatch.slurm.submit")\n'},
        "conf/compose.py imports slurm/submit.py, which is above it",
    ),
    "a cycle": (
        {"scaling/units.py": "from isobatch.scaling import rules\n"},
        "scaling.rules, scaling.units import each other",
    ),
    "a long function": (
        {"slurm/render.py": "\ndef render():\n" + "    pass\n" * 50},
        "slurm/render.py:2 render has 51 lines",
    ),
    "too many parameters": (
        {"slurm/render.py": "class A:\n    def f(self, a, b, c, d, e, f, g, *args, **more): ...\n"},
        "slurm/render.py:2 f has 9 parameters",
    ),
    "a folder with one file": (
        {"scaling/report/__init__.py": "", "scaling/report/table.py": ""},
        "scaling/report/table.py is the only file of its folder",
    ),
}  # fmt: skip


def _check(root: Path, files: dict[str, str]) -> int:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return main(root)


def test_a_sound_tree_passes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code = _check(tmp_path, SOUND)
    assert code == 0
    assert capsys.readouterr().out.splitlines() == [
        "11 files, 152 lines, 6 imports",
        "0 imports upward, 0 cycles, 0 functions, 0 folders",
    ]


@pytest.mark.parametrize("case", WRONG)
def test_a_broken_rule_is_found(case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files, problem = WRONG[case]
    assert _check(tmp_path, SOUND | files) == 1
    assert capsys.readouterr().out.splitlines()[0] == problem
