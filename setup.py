"Give setuptools the metadata that settings.ini holds."

import re
from configparser import ConfigParser
from pathlib import Path

from setuptools import setup

here = Path(__file__).parent
parser = ConfigParser(delimiters=["="])
parser.read(here / "settings.ini", encoding="utf-8")
cfg = parser["DEFAULT"]
version = re.search(
    r'__version__ = "(.+)"', (here / cfg["lib_path"] / "__init__.py").read_text(encoding="utf-8")
)[1]
lines = lambda key: cfg[key].strip().splitlines()
pythons = range(int(cfg["min_python"].split(".")[1]), int(cfg["max_python"].split(".")[1]) + 1)

setup(
    name=cfg["lib_name"],
    version=version,
    description=cfg["description"],
    long_description=(here / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    author=cfg["author"],
    author_email=cfg["author_email"],
    license=cfg["license"],
    license_files=["LICENSE", f"{cfg['lib_path']}/data/LICENSE*"],
    keywords=cfg["keywords"],
    classifiers=[
        f"Development Status :: {cfg['status']}",
        f"Intended Audience :: {cfg['audience']}",
        "Intended Audience :: Science/Research",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Programming Language :: Python :: 3",
        *(f"Programming Language :: Python :: 3.{minor}" for minor in pythons),
    ],
    packages=[cfg["lib_path"]],
    package_data={cfg["lib_path"]: ["data/*"]},
    python_requires=f">={cfg['min_python']}",
    install_requires=lines("requirements"),
    extras_require={
        extra: lines(f"{extra}_requirements") for extra in ("hf", "plot", "tensorboard", "dev")
    },
    entry_points={
        "console_scripts": lines("console_scripts"),
        "nbdev": [f"{cfg['lib_path']} = {cfg['lib_path']}._modidx:d"],
    },
)
