"""A Ray of one's own that does not start: said in a line, with what helps; mistakes of ours stay what they are."""

import socket
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import ray

from millijoule.jobs.set_up import ray_cluster
from millijoule.jobs.set_up.ray_cluster import connected
from millijoule.workers.errors import InputError, NodeError


@pytest.fixture
def failing(monkeypatch):
    """Make `ray.init` raise."""
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(ray, "is_initialized", lambda: False)

    def fail_with(error):
        def init(*_, **__):
            raise error

        monkeypatch.setattr(ray, "init", init)

    return fail_with


@pytest.mark.parametrize(
    "kind", [Exception, RuntimeError, TimeoutError]
)  # Ray raises its time-outs as the first
def test_a_machine_too_busy_for_ray_is_told_what_helps(failing, kind):
    failing(kind("The current node timed out during startup.\nMore of it."))
    told = r"timed out during startup\.\).*RAY_raylet_start_wait_time_s"
    with pytest.raises(NodeError, match=told), connected(None):
        pass


def test_other_errors_are_not_hidden(failing):
    failing(TypeError("no such option"))
    with pytest.raises(TypeError, match="no such option"), connected(None):
        pass


@pytest.mark.parametrize("address", ["127.0.0.1:1", "nonsense"])
def test_an_address_where_nobody_answers_is_named_by_where_it_came_from(failing, monkeypatch, address):
    failing(ValueError("Invalid address format"))
    with (
        pytest.raises(InputError, match=rf"^--ray-address {address}: no Ray cluster answers"),
        connected(address),
    ):
        pass
    monkeypatch.setenv("RAY_ADDRESS", address)
    words = rf"^environment variable RAY_ADDRESS is '{address}': no Ray cluster answers"
    with pytest.raises(InputError, match=words), connected(None):
        pass


@pytest.fixture
def listening():
    """The address of a socket that takes connections and never says a word."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"127.0.0.1:{server.getsockname()[1]}"


def test_a_head_that_does_not_let_us_in_is_not_called_one_that_does_not_answer(failing, listening):
    failing(ConnectionError(f"Failed to connect to Ray cluster at {listening}"))
    with pytest.raises(InputError) as told, connected(listening):
        pass
    assert str(told.value).startswith(f"--ray-address {listening}: something listens there")
    assert "RAY_AUTH_MODE" in str(told.value)
    assert "no Ray cluster" not in str(told.value)


def test_versions_that_do_not_match_are_both_told(failing, listening):
    """As `ray._private.utils.check_version_info` words it."""
    failing(
        RuntimeError(
            "Version mismatch: The cluster was started with:\n    Ray: 2.59.0\nThis process:\n    Ray: 2.60.0"
        )
    )
    with (
        pytest.raises(InputError, match=r"with: Ray: 2\.59\.0 This process: Ray: 2\.60\.0"),
        connected(listening),
    ):
        pass


def test_an_empty_address_in_the_environment_is_none(monkeypatch):
    """The Ray is then this machine's own, which nobody will ever join."""
    asked = []
    monkeypatch.setenv("RAY_ADDRESS", "")
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", lambda *where, **_: asked.append(where))
    monkeypatch.setattr(ray, "shutdown", lambda: None)
    with connected(None) as cluster:
        assert cluster.own
    assert asked == [("local",)]


def test_the_dashboard_s_address_is_told_from_the_head_s(failing, monkeypatch):
    failing(AssertionError("Ray must not be asked"))
    with pytest.raises(InputError, match=r"HOST:6379"), connected("http://127.0.0.1:8265"):
        pass
    with ThreadingHTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setattr(ray_cluster, "DASHBOARD_PORT", server.server_port)
        with pytest.raises(InputError, match=r"HOST:6379"), connected(f"127.0.0.1:{server.server_port}"):
            pass
        server.shutdown()


def test_a_head_at_the_dashboard_s_usual_port_is_joined(failing, listening, monkeypatch):
    monkeypatch.setattr(ray_cluster, "DASHBOARD_PORT", int(listening.rpartition(":")[2]))
    monkeypatch.setattr(ray_cluster, "CONNECT_TIMEOUT_S", 0.2)
    failing(ConnectionError("asked"))
    with pytest.raises(InputError, match=r"\(asked\)"), connected(listening):
        pass
