"""Packaging of trtc. The repository root is the package `trtc`; its folders are its sub-packages."""

import shutil
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent
ROOMS = ("core", "kernels", "runtime", "plugins", "cli")


def version() -> str:
    for line in (ROOT / "__init__.py").read_text().splitlines():
        if line.startswith("__version__"):
            return line.split('"')[1]
    raise RuntimeError("no __version__ in __init__.py")


class BuildPackage(build_py):
    """The root folder is the package, but this script, which lies in it, is not part of it.

    Nor is what an older version had: `pip install .` leaves it in build/, from where setuptools would pack it again.
    """

    def run(self):
        shutil.rmtree(Path(self.build_lib, "trtc"), ignore_errors=True)
        super().run()

    def find_package_modules(self, package, package_dir):
        modules = super().find_package_modules(package, package_dir)
        return [found for found in modules if found[:2] != ("trtc", "setup")]


STEP = Extension(
    "trtc.kernels.cpu_step._step",
    [f"kernels/cpu_step/{name}.c" for name in ("step", "int8_layer", "context_attention")],
    depends=["kernels/cpu_step/vectors.h"],
    extra_compile_args=["-O3", "-fopenmp"],
    extra_link_args=["-fopenmp"],
    optional=True,  # without a C compiler, or off x86-64, target cpu runs on torch alone
)

CUDA = [
    "cuda-python>=13.0,<14",
    # The compiler, its headers and CCCL stay at 13.0: PTX of a newer one may not load on a 13.0 driver.
    "nvidia-cuda-nvrtc==13.0.*",
    "nvidia-cuda-runtime==13.0.*",
    "nvidia-cuda-cccl==13.0.*",
]
SERVE = ["fastapi>=0.115", "uvicorn>=0.30", "prometheus-client>=0.20", "jinja2>=3.1.6"]
MPI = ["mpi4py>=4.0", "openmpi>=5.0"]
ROUGE = "rouge-score>=0.1.2"
EVAL = [ROUGE, "datasets>=2.14"]
ONNX = "onnx>=1.17"

setup(
    name="trtc",
    version=version(),
    description="Compiles Hugging Face transformer checkpoints into engines and runs them",
    long_description=(ROOT / "README.md").read_text(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.11",
    package_dir={"trtc": "."},
    cmdclass={"build_py": BuildPackage},
    ext_modules=[STEP],
    packages=["trtc", *(f"trtc.{name}" for name in find_packages(str(ROOT)) if name.split(".")[0] in ROOMS)],
    package_data={
        "trtc": ["py.typed"],
        "trtc.kernels": ["**/*.cu", "**/*.cuh"],
        "trtc.cli": ["templates/**/*"],
        "trtc.runtime.server": ["*.html"],
    },
    install_requires=[
        "torch>=2.11,<2.14",
        "transformers>=4.50",
        "tokenizers>=0.21",
        "safetensors>=0.5",
        "numpy>=1.26",
        "pluggy>=1.5",
        "tqdm>=4.60",
    ],
    extras_require={
        "cuda": CUDA,
        "tensorrt": ["tensorrt>=10.13"],
        "tensorrt-rtx": ["tensorrt-rtx-cu13"],
        "mpi": MPI,
        "serve": SERVE,
        "eval": EVAL,
        "bench": ["ctranslate2>=4.8"],  # the peer of trtc.bench.cpu
        "lm-eval": [
            "lm-eval>=0.4.13,<0.5",
            "aiohttp>=3.9",
            "tenacity>=8",
        ],  # the last two: for its models over HTTP
        "onnx": [ONNX],
        "test": [
            "pytest>=8",
            "setuptools>=77",
            "pytest-benchmark>=5",
            "pytest-xdist>=3",
            "hypothesis>=6",
            "ruff>=0.17,<0.18",  # what one release formats, the next may not
            "mypy>=2.4,<2.5",
            "import-linter>=2.1",
            ROUGE,
            ONNX,
            # the files of tensorrt.plugin, which tests run OPT's plugins on; the libraries below it are not needed
            "tensorrt-cu13-bindings==11.4.0.106; platform_system == 'Linux' and platform_machine == 'x86_64'",
            "httpx>=0.27",
            "openai>=1.50",
        ],
    },
    entry_points={
        "console_scripts": ["trtc = trtc.cli.__main__:run"],
        "trtc": ["opt = trtc.plugins.opt"],
    },
)
