"""A dashboard that serves a monitor, what is asked of it over HTTP, and its page in a browser."""

import contextlib
import http.client
import time

from monitors import Written

from sjepa_deploy.runtime.watch.dashboard import Dashboard

TOKEN = "not-a-secret-0123456789"


def get(dashboard, path="/", *, headers=None):
    """Return status, headers and text of an answer."""
    connection = http.client.HTTPConnection("127.0.0.1", dashboard.port, timeout=30)
    try:
        connection.request("GET", path, headers=headers or {})
        answer = connection.getresponse()
        return answer.status, dict(answer.getheaders()), answer.read().decode()
    finally:
        connection.close()


def wait_until_served(dashboard, headers=None):
    wait_until(lambda: "sjepa_windows_total" in get(dashboard, "/metrics", headers=headers)[2])


def wait_until(condition, seconds=120):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come to that"
        time.sleep(0.05)


@contextlib.contextmanager
def idle_dashboard(monitor=None, **options):
    with Dashboard(monitor or Written().monitor, port=0, **options) as serving:
        headers = {"authorization": f"Bearer {options['token']}"} if options.get("token") else None
        wait_until_served(serving, headers)
        yield serving


def open_page(browser, dashboard, **how):
    browser.open(dashboard.url, **how)
    browser.wait("rows.length > 0 && document.querySelector('#map circle') !== null")


def texts(browser, selector):
    return browser.run(f"return [...document.querySelectorAll('{selector}')].map(cell => cell.textContent)")


def assert_clean(browser, dashboard):
    """Assert that the page asked nobody but its own server, and had nothing to complain about."""
    browser.look()
    assert browser.errors == []
    assert set(browser.requests) == {dashboard.url, f"{dashboard.url}events"}
