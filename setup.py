"""Ships configs/, which lies at the root of the repository, inside the package as prefgen/configs."""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py


class BuildWithConfigs(build_py):
    """An editable install finds configs/ at the root of the checkout and needs no copy."""

    def run(self) -> None:
        """Build, then copy."""
        super().run()
        if not self.editable_mode:
            source = Path(__file__).parent / "configs"
            for path in sorted(source.rglob("*.yaml")):
                target = Path(self.build_lib) / "prefgen" / "configs" / path.relative_to(source)
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, target)


setup(cmdclass={"build_py": BuildWithConfigs})
