import pytest

from qkvjax.kernels import choice


@pytest.fixture(autouse=True)
def nothing_decided():
    """No test uses what another one's pretended device made "auto" decide."""
    yield
    choice._decisions.clear()
    choice._agreed.clear()
    choice._printed.clear()
