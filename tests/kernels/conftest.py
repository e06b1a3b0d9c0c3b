import pytest
from shapes_checked import shapes_checked

from qkvjax.kernels import choice


@pytest.fixture(autouse=True)
def nothing_decided():
    """No test uses what another one's pretended device made "auto" decide."""
    yield
    choice._decisions.clear()
    choice._agreed.clear()
    choice._printed.clear()


@pytest.fixture(scope="module", autouse=True)
def shapes():
    """Every call in these tests has the shapes that its annotations say."""
    with shapes_checked():
        yield
