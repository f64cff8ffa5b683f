import pytest

from spikedistill.neurons import kernels
from spikedistill.neurons.kernels import native


@pytest.fixture(params=["eager", "native"])
def kernel(request):
    if request.param == "native" and native.library() is None:
        pytest.skip("the native kernel was not built")
    with kernels.use(request.param):
        yield request.param


@pytest.fixture
def built():
    if native.library() is None:
        pytest.skip("the native kernel was not built")
    with kernels.use("native"):
        yield
