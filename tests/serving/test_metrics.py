import pytest

pytest.importorskip("prometheus_client", reason="pip install prometheus-client")

from minionerec.serving.metrics import Metrics


def test_the_numbers_of_a_server_are_its_own():
    """Two servers of one process share no counter, and waiting requests are read when the text is made."""
    one, other = Metrics(), Metrics()
    waiting = [3]
    one.watch(lambda: len(waiting))
    one.requests.labels("/ready", "200").inc()
    assert 'minionerec_requests_total{path="/ready",status="200"} 1.0' in one.text().decode()
    assert "/ready" not in other.text().decode()
    waiting.clear()
    assert "minionerec_waiting 0.0" in one.text().decode()
