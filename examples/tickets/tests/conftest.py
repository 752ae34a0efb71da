import pytest

from examples.tickets.app import create_app


@pytest.fixture(scope="session")
def db_app(db_url):
    return create_app(db_url)
