import pytest
from shapes_checked import shapes_checked


@pytest.fixture(scope="module", autouse=True)
def shapes():
    """Every call in these tests has the shapes that its annotations say."""
    with shapes_checked():
        yield
