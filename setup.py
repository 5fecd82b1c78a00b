"""Package metadata, version ranges and extras. Tested pins are in constraints.txt, tool settings in pyproject.toml."""

from __future__ import annotations

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
# Read, not imported: the package's dependencies aren't there yet when this runs.
VERSION = re.search(
    r'^__version__ = "(.+)"$', (ROOT / "torchrl_amago/__init__.py").read_text("utf-8"), re.MULTILINE
)[1]

# Ranges follow what the code leans on: torchrl and tensordict change private behaviour between minor versions
# (collectors, samplers, step_mdp), so their minor version is bounded; torch is the one minor version tested.
INSTALL_REQUIRES = [
    "torch>=2.13,<2.14",
    "torchrl>=0.14.1,<0.15",
    "tensordict>=0.14.3,<0.15",
    "gymnasium>=1.1,<1.5",
    "numpy>=1.26",
    "tqdm>=4.66",
    "matplotlib>=3.8",
    "tyro>=0.9",
]

# Minari datasets; minari imports pillow without declaring it.
OFFLINE = ["minari[hdf5]>=0.5.3,<0.6", "pillow"]

TEST = [
    "pytest>=8.2",
    "pytest-benchmark>=5.0",
    "pytest-xdist>=3.6",  # a worker for each core
    "hypothesis>=6.100",
    "ruff>=0.12",
    "tensorboard>=2.16",  # the trainer's TensorBoard option is tested by default
    "safetensors>=0.4",  # so is reading AMAGO's weights
    *OFFLINE,  # and offline data
]

FEATURES = {
    "amago": ["safetensors>=0.4"],  # reading the weights that AMAGO's checkpoints hold
    "tensorboard": ["tensorboard>=2.16"],
    "wandb": ["wandb>=0.19"],
    # mujoco 4 breaks dm_control; gymnasium's MuJoCo environments import imageio.
    "mujoco": ["mujoco>=3.3,<4", "imageio>=2.14.1"],
    "offline": OFFLINE,
}

# Environment packages. All of them install together when gymnasium is 1.3, which constraints.txt pins.
DOMAINS = {
    "classic": ["gymnasium[classic-control,box2d]>=1.1,<1.5"],
    "popgym": ["popgym[navigation]>=1.0.7,<2"],
    "minigrid": ["minigrid>=3.0,<4"],
    "atari": ["ale-py>=0.11,<0.13", "opencv-python-headless"],
    # Later releases need a later mujoco than metaworld allows (3.3.0). Old pips find no extra with an underscore.
    "dm-control": ["mujoco>=3.3,<3.4", "dm_control==1.0.28", "shimmy>=2,<3", "imageio"],
    "metaworld": ["metaworld>=3.1.1,<4"],
    "crafter": ["crafter>=1.8.3,<2", "numba>=0.61"],  # numba makes it about five times faster
    "retro": ["stable-retro>=1.0,<2"],
    "jax": [
        "gymnax>=1.0.1,<2",
        "six",  # gymnax imports it without declaring it
        "xminigrid>=0.9.3,<0.10",
        "craftax>=1.6,<2",
        "jax>=0.6,<0.12",
    ],
    "procgen": ["envpool>=1.2,<1.3"],  # procgen itself has no wheels for current Pythons
    "pokemon": ["poke-env>=0.16,<0.17"],
}

ACCELERATORS = {
    "ray": ["ray>=2.40"],
    # Source only: they need nvcc and `pip install --no-build-isolation`. Nothing ever requires them.
    "flash": ["flash-attn>=2.6"],
    "mamba": ["mamba-ssm>=2.2", "causal-conv1d>=1.4"],
}

DOCS = ["sphinx>=7.3", "furo>=2024.8", "myst-parser>=3", "sphinx-copybutton>=0.5"]

setup(
    name="torchrl-amago",
    version=VERSION,
    description="TorchRL components for adaptive agents with long memory (the AMAGO method)",
    long_description=(ROOT / "README.md").read_text("utf-8"),
    long_description_content_type="text/markdown",
    author="The torchrl_amago authors",
    license="MIT",
    python_requires=">=3.10",
    packages=find_packages(include=["torchrl_amago", "torchrl_amago.*"]),
    install_requires=INSTALL_REQUIRES,
    extras_require={
        "test": TEST,
        "docs": DOCS,
        "dev": [*TEST, *DOCS, "pytest-cov>=5"],
        **FEATURES,
        **DOMAINS,
        **ACCELERATORS,
    },
    classifiers=[
        "Intended Audience :: Science/Research",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3.10",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
