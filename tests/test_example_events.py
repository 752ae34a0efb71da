"""The example that streams a row's changes to a browser."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest

from examples.events.app import create_app, db


@pytest.mark.parametrize("driver", ["psycopg2"], indirect=True)
def test_g2_a_browser_sees_each_change(database_url: str) -> None:
    app = create_app(database_url)
    client, worker = app.test_client(), app.test_client()
    assert 'action="/jobs"' in client.get("/").text
    assert client.post("/jobs").location == "/jobs/1"
    assert '"/jobs/1/events"' in client.get("/jobs/1").text
    assert client.get("/jobs/2/events").status_code == 404
    response = client.get("/jobs/1/events")
    assert response.mimetype == "text/event-stream"
    stream = response.iter_encoded()
    assert next(stream) == b'data: {"progress": 0}\n\n'
    for percent in (50, 100):
        with ThreadPoolExecutor(1) as elsewhere:  # here it would share the context of the response that goes on
            assert elsewhere.submit(worker.post, f"/jobs/1/progress/{percent}").result().status_code == 204
        assert next(stream) == b'data: {"progress": %d}\n\n' % percent
    assert not list(stream)
    response.close()
    with app.app_context():
        db.engine.dispose()
