"""Two import packages from two source roots: `packsft` from the top, `packsft_kernels` from `kernels/`.

`kernels/` itself is no package: an importable `kernels` would shadow Hugging Face's package of that name.
"""

from setuptools import find_packages, setup

setup(
    packages=find_packages(include=["packsft", "packsft.*"]) + find_packages("kernels"),
    package_dir={"packsft": "packsft", "packsft_kernels": "kernels/packsft_kernels"},
    package_data={"packsft": ["py.typed", "app/page.html"], "packsft_kernels": ["py.typed"]},
)
