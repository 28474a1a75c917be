import pytest
from small import build_pair


@pytest.fixture
def pair():
    """The host's model, and a copy that is accelerated."""
    return build_pair()
