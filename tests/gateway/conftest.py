import pytest

from gateway.model import Model, load_model
from tests.tiny import write_checkpoint


@pytest.fixture(scope="session")
def model(tmp_path_factory) -> Model:
    path = write_checkpoint(tmp_path_factory.mktemp("checkpoints") / "tiny", layers=1, experts=2, max_positions=512)
    return load_model(path, "tiny")


@pytest.fixture
def ids(model):
    """Token ids of a text."""
    return lambda text: model.tokenizer.encode(text).ids
