"""The browser page in a real browser, who is let in, and that nobody who watches can hold the decoder up."""

import asyncio
import contextlib
import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from dashboards import TOKEN, assert_clean, get, idle_dashboard, open_page, texts, wait_until, wait_until_served
from monitors import LiveDecoder, Written, facts
from prometheus_client.parser import text_string_to_metric_families

from sjepa_deploy.eeg.quality import ChannelState
from sjepa_deploy.errors import DashboardError, MissingDependencyError
from sjepa_deploy.runtime.live.commands import BadChannels, Commands, Load, Mark, Pause, Reply, Start, Stop
from sjepa_deploy.runtime.side_process import is_loopback
from sjepa_deploy.runtime.watch import dashboard as dashboard_module
from sjepa_deploy.runtime.watch.dashboard import DASHBOARD, Dashboard
from sjepa_deploy.runtime.watch.dashboard_server import Feed


@pytest.fixture(scope="module")
def decoder(make_bundle):
    with LiveDecoder(make_bundle("prelocal", n_outputs=3), flat=1, saturated=4) as running:
        yield running


@pytest.fixture(scope="module")
def dashboard(decoder):
    with Dashboard(decoder.monitor, port=0) as serving:
        wait_until_served(serving)
        yield serving


# The page


@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (1280, "dark"), (390, "light")])
def test_page_is_live_and_fits(browser, dashboard, decoder, tmp_path, width, scheme):
    open_page(browser, dashboard, width=width, scheme=scheme)
    shown = int(browser.text("#decisions").replace(",", ""))
    browser.wait("document.querySelector('#values polyline') !== null")
    first = texts(browser, "#outputs td.n")
    drawn = browser.run("return document.querySelector('#values polyline').getAttribute('points')")
    browser.wait(f"state.decisions > {shown + 5}")
    assert shown + 5 < int(browser.text("#decisions").replace(",", "")) <= decoder.monitor.snapshot().counters.decisions
    assert len(first) == 3
    assert first != texts(browser, "#outputs td.n")
    assert drawn != browser.run("return document.querySelector('#values polyline').getAttribute('points')")
    assert browser.text("#state") == "Decoding"
    assert browser.text("#channels") == "Fz flat (repaired), Cz saturated (repaired)"
    assert browser.run("return document.querySelectorAll('#histogram .bar').length") > 0
    assert browser.run("return document.documentElement.scrollWidth <= innerWidth")
    unnamed = "return [...document.querySelectorAll('svg[role=img]')].filter(svg => !svg.getAttribute('aria-label')).length"
    assert browser.run(unnamed) == 0
    assert browser.screenshot(tmp_path / "page.png").stat().st_size > 10_000
    assert_clean(browser, dashboard)


def test_numbers_are_those_of_the_monitor(browser):
    written = Written(clock=lambda: 100.0)
    for index in range(250):
        latency = 0.24 if index in (100, 101) else 0.002
        written.decide(index, transport=0.01, latency=latency, prediction=(np.sin(index), np.nan), bridged=True)
    written.count(windows=1, skipped_gap=1, samples=1234, misses=2, longest_misses=2)
    written.monitor.received(99.5)
    written.monitor.set_quality(np.full(8, ChannelState.NAN), np.full(8, np.nan))
    written.happen("source lost", kind="lost")
    with idle_dashboard(written.monitor) as dashboard:
        browser.open(dashboard.url)
        browser.wait("rows.length === 250 && state !== null")
        shown = {"decisions": "250", "age-p50": "12.0 ms", "age-max": "250 ms", "misses": "2", "run": "2", "skipped": "1"}
        for name, text in (shown | {"silence": "500 ms", "flags": "bridged"}).items():
            assert browser.text(f"#{name}") == text, name
        assert "From the arrival of the sample: median 2.00 ms" in browser.text("#age-span")
        assert texts(browser, "#outputs td.n") == [f"{np.sin(249):.3f}", "NaN"]
        assert browser.text("#channels").startswith("F3 NaN, Fz NaN")
        assert "lost: source lost" in browser.text("#events")
        counted = dict(zip(texts(browser, "#counters th"), texts(browser, "#counters td"), strict=True))
        assert counted | {"samples received": "1,234", "skipped: gap": "1", "windows": "251"} == counted
        assert not any(name.startswith(("skipped: late", "samples lost")) for name in counted)  # what did not happen
        assert_clean(browser, dashboard)
    browser.wait("document.getElementById('alert').textContent.startsWith('The decoder has ended')")


def test_names_from_a_stream_are_text(browser):
    """Channel names come from whoever sends the stream."""
    hostile = "<img src=x onerror=alert(1)></script><script>alert(2)</script>"
    names = (hostile, *facts().ch_names[1:])
    written = Written(bundle=hostile, source=hostile, output_names=(hostile, "b"), ch_names=names)
    written.decide(0, prediction=(1, 2))
    written.monitor.set_quality([1] + 7 * [0], np.ones(8))
    written.happen(hostile, kind=hostile)
    with idle_dashboard(written.monitor) as dashboard:
        open_page(browser, dashboard)
        assert browser.text("#bundle") == hostile
        assert browser.text("#channels") == f"{hostile} flat"
        assert browser.run("return document.querySelectorAll('img').length") == 0
        assert_clean(browser, dashboard)


def test_without_positions_the_channels_are_a_grid(browser):
    written = Written(positions=None)
    written.decide(0, prediction=(1, 2))
    with idle_dashboard(written.monitor) as dashboard:
        open_page(browser, dashboard)
        assert browser.run("return document.querySelectorAll('#map title').length") == 8
        assert browser.run("return document.querySelectorAll('#map .head').length") == 0
        assert_clean(browser, dashboard)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_colours_can_be_told_from_their_ground(browser, dashboard, scheme):
    """WCAG: text needs a contrast of 4.5, signs 3."""
    open_page(browser, dashboard, scheme=scheme)

    def luminances(*names):
        of_root = "const of = getComputedStyle(document.documentElement); return "
        values = browser.run(of_root + f"{json.dumps(names)}.map(name => of.getPropertyValue('--' + name).trim())")
        values = [value if len(value) == 7 else "#" + "".join(2 * digit for digit in value[1:]) for value in values]
        channels = np.array([[int(value[i : i + 2], 16) for i in (1, 3, 5)] for value in values]) / 255
        linear = np.where(channels <= 0.04045, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4)
        return linear @ [0.2126, 0.7152, 0.0722]

    def contrast(a, b):
        return (max(a, b) + 0.05) / (min(a, b) + 0.05)

    grounds = luminances("paper", "card")
    for text in luminances("ink", "soft", "bad"):
        assert all(contrast(text, ground) >= 4.5 for ground in grounds)
    for sign in luminances("accent", "ok", "flat", "saturated", "noisy", "nan", "missing"):
        assert contrast(sign, grounds[1]) >= 3


# Prometheus and the watchdog


def test_metrics_are_those_of_the_monitor():
    written = Written(clock=lambda: 100.0)
    latencies = np.random.default_rng(0).lognormal(-4, 1, 500)
    ages = [
        written.decide(index, time=0.0, transport=1.0, latency=latency, prediction=(index, -index)).age
        for index, latency in enumerate(latencies)
    ]
    written.count(windows=1, skipped_gap=1, samples_lost=7, samples=5000, misses=11)
    monitor = written.monitor
    monitor.received(99.0)
    monitor.set_quality([1, 0, 0, 0, 0, 0, 0, 5], [np.nan] + 7 * [12.5], 7 * [False] + [True])
    monitor.set_state("decoding")
    with idle_dashboard(monitor) as dashboard:
        status, headers, text = get(dashboard, "/metrics")
    assert status == 200
    assert headers["content-type"].startswith("text/plain")
    families = {family.name: family for family in text_string_to_metric_families(text)}
    samples = {(s.name, *s.labels.values()): s.value for family in families.values() for s in family.samples}
    assert samples["sjepa_decisions_total",] == 500
    assert samples["sjepa_windows_total",] == 501
    assert samples["sjepa_windows_skipped_total", "gap"] == 1
    assert samples["sjepa_samples_lost_total",] == 7
    assert samples["sjepa_samples_received_total",] == 5000
    assert samples["sjepa_deadline_misses_total",] == 11
    assert samples["sjepa_windows_skipped_total", "late"] == samples["sjepa_gaps_total",] == 0  # there from the start
    for name, values in (("sjepa_latency_seconds", latencies), ("sjepa_decision_age_seconds", np.array(ages))):
        assert samples[f"{name}_sum",] == pytest.approx(values.sum())
        buckets = {s.labels["le"]: s.value for s in families[name].samples if s.name.endswith("_bucket")}
        assert len(buckets) == 62
        for le, n in buckets.items():
            assert n == (values <= float(le)).sum()
    assert "arrival" in families["sjepa_latency_seconds"].documentation
    assert "stamp" in families["sjepa_decision_age_seconds"].documentation
    assert samples["sjepa_age_seconds", "0.5"] == pytest.approx(1 + np.median(latencies))
    assert samples["sjepa_channels", "flat"] == samples["sjepa_channels", "missing"] == samples["sjepa_channels_repaired",] == 1
    assert samples["sjepa_channel_rms", "P4"] == 12.5
    assert np.isnan(samples["sjepa_channel_rms", "F3"])
    assert samples["sjepa_prediction", "right"] == -499
    assert samples["sjepa_stream_state", "decoding"] == 1
    assert samples["sjepa_stream_state", "silent"] == 0
    assert samples["sjepa_silence_seconds",] == 1.0
    assert families["sjepa_stream_info"].samples[0].labels["bundle"] == "left-or-right"


def test_health_is_that_of_the_stream():
    monitor = Written().monitor
    with idle_dashboard(monitor) as dashboard:
        assert get(dashboard, "/healthz")[0] == 503  # waiting for a source
        for state, status in (("decoding", 200), ("silent", 503), ("filling", 200), ("reconnecting", 503)):
            monitor.set_state(state)
            wait_until(lambda state=state: json.loads(get(dashboard, "/healthz")[2])["state"] == state)
            assert get(dashboard, "/healthz")[0] == status


def test_no_decisions_are_told_to_the_watchdog_and_on_the_page(browser):
    """Samples come all the time, and a decision at first: green is for decisions alone."""
    now = [100.0]
    written = Written(clock=lambda: now[0], overdue=7.0)
    written.monitor.received(100.0)
    written.decide(0, time=100.0, prediction=(1, 2))
    green = "return getComputedStyle(document.getElementById('state'), '::before').color"
    with idle_dashboard(written.monitor) as dashboard:
        open_page(browser, dashboard)
        assert browser.text("#state") == "Decoding"
        decoding = browser.run(green)
        now[0] = 108.0
        written.monitor.received(108.0)
        browser.wait("document.getElementById('state').textContent === 'No decisions'")
        assert browser.run(green) != decoding
        assert browser.text("#silence") == "0.0 ms"
        assert json.loads(get(dashboard, "/healthz")[2])["state"] == "no decisions"
        assert get(dashboard, "/healthz")[0] == 503
        assert 'sjepa_stream_state{sjepa_stream_state="no decisions"} 1.0' in get(dashboard, "/metrics")[2]
        written.decide(1, time=108.0, prediction=(1, 2))
        browser.wait("document.getElementById('state').textContent === 'Decoding'")
        assert get(dashboard, "/healthz")[0] == 200
        assert_clean(browser, dashboard)
    browser.wait("document.getElementById('state').textContent.startsWith('Stopped')")
    assert browser.run(green) != decoding


# Who is let in


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1", "10.0.0.7", "fe80::1", "example.org", ""])
def test_other_addresses_need_a_token(host):
    assert not is_loopback(host)
    with pytest.raises(DashboardError, match="SJEPA_DASHBOARD_TOKEN"):
        Dashboard(Written().monitor, host=host, port=0)


@pytest.mark.parametrize("token", ["", "short", "fifteen-letters", "ä" * 20, "with a\nnew line in it"])
def test_weak_tokens_are_refused(token):
    with pytest.raises(DashboardError, match="16 characters"):
        Dashboard(Written().monitor, port=0, token=token)


def test_token_as_header_cookie_or_once_in_the_address():
    with idle_dashboard(token=TOKEN) as dashboard:
        for path in ("/", "/events", "/metrics", "/healthz", "/nothing"):
            status, headers, text = get(dashboard, path)
            assert status == 401
            assert headers["www-authenticate"] == "Bearer"
            assert "left-or-right" not in text
            assert get(dashboard, path, headers={"authorization": f"Bearer {TOKEN[:-1]}"})[0] == 401
            assert get(dashboard, path, headers={"authorization": f"Basic {TOKEN}"})[0] == 401
        assert get(dashboard, f"/?token={TOKEN}x")[0] == 403
        assert get(dashboard, "/?token=")[0] == 403
        assert get(dashboard, "/metrics", headers={"authorization": f"bearer {TOKEN}"})[0] == 200
        status, headers, _ = get(dashboard, f"/?token={TOKEN}")
        assert (status, headers["location"]) == (303, "/")
        cookie, *attributes = headers["set-cookie"].split("; ")
        assert {"httponly", "samesite=lax"} <= {attribute.lower() for attribute in attributes}
        assert TOKEN not in cookie
        assert get(dashboard, headers={"cookie": cookie})[0] == 200
        for wrong in (cookie[:-1], cookie.replace(str(dashboard.port), "1"), f"{cookie.split('=')[0]}={TOKEN}", "=;;\\"):
            assert get(dashboard, headers={"cookie": wrong})[0] == 401


def test_token_in_a_browser(browser):
    with idle_dashboard(token=TOKEN) as dashboard:
        browser.open(dashboard.url)
        assert "This needs the token" in browser.text("body")
        browser.open(f"{dashboard.url}?token={TOKEN}")
        browser.wait("facts !== null && state !== null")
        assert browser.driver.current_url == dashboard.url  # the token does not stay in the address
        assert browser.run("return document.cookie") == ""  # nor can a script read what stays


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("localhost", 200),
        ("127.0.0.1:8765", 200),
        ("[::1]:8765", 200),
        ("192.0.2.1", 200),
        (socket.gethostname(), 200),
        ("evil.example", 421),
        ("127.0.0.1.evil.example:80", 421),
        ("localhost.evil.example", 421),
        ("", 421),
        ("[::1", 421),
    ],
)
def test_other_names_for_this_machine_are_refused(dashboard, host, status):
    """What keeps a page of another site out, whose name resolves to this machine (DNS rebinding)."""
    assert get(dashboard, headers={"host": host})[0] == status


def test_every_answer_says_what_a_browser_may_do_with_it(dashboard):
    for path in ("/", "/metrics", "/healthz", "/nothing"):
        headers = get(dashboard, path)[1]
        policy = headers["content-security-policy"]
        assert policy.startswith("default-src 'none'; style-src 'sha256-")
        assert "frame-ancestors 'none'" in policy
        assert "unsafe" not in policy
        assert "http" not in policy
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["cross-origin-resource-policy"] == "same-origin"
        assert "access-control-allow-origin" not in headers


def post(dashboard, body, *, path="/command", method="POST", **headers):
    """Return status and text of the answer to a command. `headers` are without dashes."""
    connection = http.client.HTTPConnection("127.0.0.1", dashboard.port, timeout=30)
    try:
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        known = {"content-type": "application/json"} | {name.replace("_", "-"): value for name, value in headers.items()}
        connection.request(method, path, content, known)
        answer = connection.getresponse()
        return answer.status, answer.read().decode()
    finally:
        connection.close()


@pytest.mark.parametrize("token", [None, TOKEN])
def test_nothing_can_be_changed(token):
    """Without control no method changes anything, also with the token."""
    headers = {} if token is None else {"authorization": f"Bearer {token}"}
    with idle_dashboard(token=token) as dashboard:
        for method in ("POST", "PUT", "PATCH", "DELETE"):
            for path in ("/", "/events", "/metrics", "/healthz", "/command", "/commands"):
                status, _ = post(dashboard, {"command": "pause"}, path=path, method=method, **headers)
                assert status == (404 if path.startswith("/command") else 405), (method, path)


def test_control_always_needs_a_token():
    """A page of any site that is open in a browser here reaches loopback."""
    with pytest.raises(DashboardError, match="SJEPA_DASHBOARD_TOKEN"):
        Dashboard(Written().monitor, port=0, commands=Commands(lambda: 0.0))


@pytest.fixture
def controlled():
    """Give a dashboard with control over a decoder that executes whatever comes, and what it executed."""
    commands, executed, stop = Commands(lambda: 0.0), [], threading.Event()
    commands.on_executed(lambda one: executed.append(one.command))
    for kind in (Mark, Pause, Start, Stop, BadChannels, Load):
        commands.handle(kind, lambda command, asked: Reply(accepted=True, text=f"done: {type(command).__name__}"))

    def obey():
        while not stop.wait(0.01):
            commands.execute_next(0)

    thread = threading.Thread(target=obey)
    thread.start()
    with idle_dashboard(token=TOKEN, commands=commands) as dashboard:
        yield dashboard, executed, commands
    stop.set()
    thread.join()


def test_commands_come_from_the_page_or_with_the_token_in_a_header(controlled):
    dashboard, executed, _ = controlled
    bearer = {"authorization": f"Bearer {TOKEN}"}
    cookie = {"cookie": get(dashboard, f"/?token={TOKEN}")[1]["set-cookie"].split(";")[0]}
    own = f"http://127.0.0.1:{dashboard.port}"
    mark = {"command": "mark", "text": "begin"}
    for refused in ({}, {"origin": own}, {"authorization": f"Bearer {TOKEN}x"}):
        assert post(dashboard, mark, **refused)[0] == 401
    for origin in ("http://evil.example", f"http://127.0.0.1:{dashboard.port + 1}", "null", f"{own}.evil.example", ""):
        for known in (cookie, bearer):
            assert post(dashboard, mark, **known, origin=origin)[0] == 403
    assert post(dashboard, mark, **cookie)[0] == 403, "a browser says where a command comes from"
    assert post(dashboard, mark, **cookie, origin=own, host="evil.example")[0] == 421
    assert executed == []
    assert post(dashboard, mark, **cookie, origin=own) == (200, '{"accepted":true,"text":"done: Mark"}')
    assert post(dashboard, {"command": "bad channels", "names": ["Cz"]}, **bearer)[0] == 200
    assert executed == [Mark(text="begin"), BadChannels(names=("Cz",))]
    for method in ("GET", "PUT", "DELETE"):
        assert post(dashboard, mark, method=method, **bearer)[0] == 405


def test_what_is_no_command_of_the_page_is_refused_and_leaves_it_working(controlled):
    dashboard, executed, commands = controlled
    bearer = {"authorization": f"Bearer {TOKEN}"}
    for body, status in (
        (b"", 400),
        (b"{", 400),
        (b"[" * 8000, 400),
        (b"NaN", 400),
        (b"\xff\xfe", 400),
        (b" " * 10_000, 413),
        ("stop", 409),
        ({"command": "stop"}, 409),
        ({"command": "load", "bundle": "/etc/passwd"}, 409),
        ({"command": "mark"}, 409),
        ({"command": "mark", "text": ""}, 409),
        ({"command": "mark", "text": "a" * 1001}, 409),
        ({"command": "mark", "text": "a", "more": 1}, 409),
        ({"command": ["pause"]}, 409),
        ({"command": "bad channels", "names": "Cz"}, 409),
    ):
        assert post(dashboard, body, **bearer)[0] == status, body
    assert post(dashboard, {"command": "pause"}, **bearer | {"content-type": "text/plain"})[0] == 415
    longest = {"command": "mark", "text": "\N{GRINNING FACE}" * 1000}
    assert post(dashboard, json.dumps(longest, ensure_ascii=False).encode(), **bearer)[0] == 200
    assert [type(command) for command in executed] == [Mark]
    commands.close(0)
    assert post(dashboard, {"command": "pause"}, **bearer) == (409, '{"accepted":false,"text":"The run has ended."}')


# Nobody who watches holds the decoder up


def rss(pid):
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def stream_of(dashboard, *, read=True):
    client = socket.socket()
    if not read:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
    client.settimeout(30)
    client.connect(("127.0.0.1", dashboard.port))
    client.sendall(b"GET /events HTTP/1.1\r\nHost: localhost\r\n\r\n")
    return client


def read_to_the_end(client):
    data = b""
    with contextlib.suppress(ConnectionResetError):
        while more := client.recv(2**16):  # raises TimeoutError without an end
            data += more
    return data


def n_pages(dashboard):
    return float(re.search(r"^sjepa_dashboard_pages (\S+)$", get(dashboard, "/metrics")[2], re.MULTILINE)[1])


@pytest.mark.alone
def test_clients_that_do_not_read_are_let_go_and_cost_nothing(make_bundle):
    """They get no more than what the system buffers, while others and the decoder go on as before."""
    with LiveDecoder(make_bundle("prelocal"), hop=0.02) as decoder:
        with Dashboard(decoder.monitor, port=0) as dashboard:
            wait_until_served(dashboard)
            before, turns = rss(dashboard.server_pid), len(decoder.latencies)
            sleepers = [stream_of(dashboard, read=False) for _ in range(8)]
            wait_until(lambda: n_pages(dashboard) == 8)
            # the buffers are full after some 9 s, and 5 s later they are let go, not when garbage happens to be collected
            wait_until(lambda: n_pages(dashboard) == 0, seconds=40)
            assert rss(dashboard.server_pid) - before < 16 * 2**20
            for client in sleepers:
                assert len(read_to_the_end(client)) < 2**20
                client.close()
        latencies = np.array(decoder.latencies[turns:])
        assert len(latencies) > 200
        assert np.median(latencies) < 0.1  # some 0.0005 on a machine that does nothing else


def test_a_slow_client_gets_the_newest_state():
    """Nothing is kept for it: of a hundred states that came meanwhile it gets one."""

    async def slow():
        pipe = asyncio.StreamReader()
        feed = Feed({"ch_names": []})
        reading = asyncio.create_task(feed.read(pipe))
        events = feed.events()

        async def next_event():
            name, data = (await anext(events)).decode().removesuffix("\n\n").split("\n")
            return name.removeprefix("event: "), json.loads(data.removeprefix("data: "))

        async def send(*numbers):
            pipe.feed_data(b"".join(b'{"n": %d, "new": {"index": [%d]}}\n' % (n, n) for n in numbers))
            await asyncio.sleep(0)
            while feed.state.get("n") != numbers[-1]:
                await asyncio.sleep(0.001)

        assert (await next_event())[0] == "facts"
        await send(0)
        assert await next_event() == ("state", {"n": 0, "recent": {"index": [0]}, "traces": {}})
        await send(*range(1, 1000))
        assert await next_event() == ("state", {"n": 999, "recent": {"index": [*range(744, 1000)]}, "traces": {}})
        waiting = asyncio.create_task(next_event())
        await send(1000)
        assert (await waiting)[1]["n"] == 1000
        await send(1001)
        pipe.feed_eof()
        await reading
        assert (await next_event())[1]["n"] == 1001
        assert await next_event() == ("end", {})
        with pytest.raises(StopAsyncIteration):
            await anext(events)
        assert feed.streams == 0

    asyncio.run(slow())


def test_a_new_page_takes_the_place_of_the_oldest_one_which_is_told():
    with idle_dashboard() as dashboard, contextlib.ExitStack() as opened:
        clients = [opened.enter_context(stream_of(dashboard)) for _ in range(16)]
        for client in clients:
            assert client.recv(15) == b"HTTP/1.1 200 OK"
        wait_until(lambda: n_pages(dashboard) == 16)
        assert opened.enter_context(stream_of(dashboard)).recv(15) == b"HTTP/1.1 200 OK"
        told = b""
        while b"event: displaced" not in told:
            told += clients[0].recv(2**16)
        assert b"event: state" in clients[1].recv(2**16)
        assert n_pages(dashboard) == 16


def test_a_page_that_was_displaced_says_so_and_stays_away(browser):
    written = Written()
    written.decide(0, prediction=(1, 2))
    with idle_dashboard(written.monitor) as dashboard, contextlib.ExitStack() as opened:
        open_page(browser, dashboard)
        for _ in range(16):
            opened.enter_context(stream_of(dashboard)).recv(15)
        browser.wait("displaced")
        assert "Too many pages" in browser.text("#alert")
        assert browser.run("return document.getElementById('state').dataset.tone") == "bad"
        assert_clean(browser, dashboard)


def test_clients_that_do_not_read_keep_nobody_out():
    written = Written()
    with idle_dashboard(written.monitor) as dashboard, contextlib.ExitStack() as opened:
        for _ in range(16):
            opened.enter_context(stream_of(dashboard, read=False))
        wait_until(lambda: n_pages(dashboard) == 16)
        started = time.monotonic()
        newest, told = opened.enter_context(stream_of(dashboard)), b""
        while b"event: state" not in told:
            told += newest.recv(2**16)
        assert time.monotonic() - started < 10


@pytest.mark.parametrize("sent", [b"", b"GET /metrics HTTP/1.1\r\nHost: localhost\r\n"])
def test_connections_without_a_token_do_not_lock_its_owner_out(sent):
    with idle_dashboard(token=TOKEN) as dashboard, contextlib.ExitStack() as opened:
        clients = []
        for _ in range(200):
            client = opened.enter_context(socket.create_connection(("127.0.0.1", dashboard.port), timeout=30))
            client.sendall(sent)
            clients.append(client)
        owner = {"authorization": f"Bearer {TOKEN}"}
        for path in ("/", "/metrics", "/healthz"):
            assert get(dashboard, path, headers=owner)[0] in (200, 503 if path == "/healthz" else 200)
        started = time.monotonic()
        for client in clients:  # all are let go: the first at once, as others came, and the last when they sent no request
            assert read_to_the_end(client) == b""
        assert time.monotonic() - started < 20
        assert get(dashboard, "/metrics", headers=owner)[0] == 200


def test_a_request_that_comes_byte_by_byte_is_not_waited_for():
    with idle_dashboard() as dashboard, socket.create_connection(("127.0.0.1", dashboard.port), timeout=1) as client:
        started = time.monotonic()
        with contextlib.suppress(ConnectionError):
            for byte in b"GET /metrics HTTP/1.1\r\nX-Slow: " + 100 * b"a":
                client.sendall(bytes([byte]))
                with contextlib.suppress(TimeoutError):
                    assert client.recv(1) == b""
                    break
        assert 4 < time.monotonic() - started < 30


def test_a_connection_that_was_let_in_stays():
    """A page's stream and kept-alive connections outlive the time in which a first request must come."""
    with idle_dashboard(token=TOKEN) as dashboard, contextlib.ExitStack() as opened:
        client = opened.enter_context(socket.create_connection(("127.0.0.1", dashboard.port), timeout=30))
        client.sendall(f"GET /events HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {TOKEN}\r\n\r\n".encode())
        assert client.recv(15) == b"HTTP/1.1 200 OK"
        for _ in range(100):
            opened.enter_context(socket.create_connection(("127.0.0.1", dashboard.port), timeout=30))
        end = time.monotonic() + 8
        while time.monotonic() < end:
            assert client.recv(2**16)


# The server's life


def test_a_server_that_dies_is_started_again(monkeypatch, caplog):
    monkeypatch.setattr(dashboard_module, "RESTART_AFTER", 0.1)
    with idle_dashboard() as dashboard:
        first = dashboard.server_pid
        os.kill(first, signal.SIGKILL)
        wait_until(lambda: dashboard.server_pid != first)
        wait_until_served(dashboard)
    (record,) = caplog.records
    assert "ended with status -9" in record.getMessage()


def test_the_server_ends_with_its_decoder():
    """Even where the decoder is killed."""
    script = (
        "import time; from monitors import Written; "
        "from sjepa_deploy.runtime.watch.dashboard import Dashboard\n"
        "with Dashboard(Written().monitor, port=0) as d:\n"
        "    while d.server_pid is None: time.sleep(0.01)\n"
        "    print(d.server_pid, flush=True); time.sleep(600)"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, [*sys.path, str(Path(__file__).parent)]))}
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, env=environment) as process:
        server = int(process.stdout.readline())
        time.sleep(1)
        assert Path(f"/proc/{server}").exists()
        process.kill()
    wait_until(lambda: not Path(f"/proc/{server}").exists() or "Z" in Path(f"/proc/{server}/stat").read_text().split()[2])


def test_closing_frees_the_port():
    with idle_dashboard() as dashboard:
        port, server = dashboard.port, dashboard.server_pid
        with pytest.raises(DashboardError, match=f"port {port} \\(Address already in use"):
            Dashboard(Written().monitor, port=port)
    assert not Path(f"/proc/{server}").exists()
    Dashboard(Written().monitor, port=port).close()  # was never entered


def test_extra_is_named(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MissingDependencyError, match=r"\[dashboard\]"):
        Dashboard(Written().monitor)


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("127.0.0.1:80", ("127.0.0.1", 80)),
        ("0.0.0.0", ("0.0.0.0", 8765)),
        (":9000", ("127.0.0.1", 9000)),
        ("9000", ("127.0.0.1", 9000)),
        ("", ("127.0.0.1", 8765)),
        ("[::1]:0", ("::1", 0)),
        ("[::1]", ("::1", 8765)),
        ("box.lab", ("box.lab", 8765)),
    ],
)
def test_addresses(text, address):
    assert DASHBOARD.parse(text) == address


@pytest.mark.parametrize("text", ["::1", "a:b", "127.0.0.1:99999", "127.0.0.1:-1"])
def test_what_is_no_address(text):
    with pytest.raises(DashboardError, match="is not an address"):
        DASHBOARD.parse(text)


def test_an_address_of_another_machine_is_refused():
    with pytest.raises(DashboardError, match="cannot listen"):
        Dashboard(Written().monitor, host="192.0.2.1", port=0, token=TOKEN)


# With the real command


def test_stream_command_serves_its_decoder(browser, make_bundle):
    bundle = make_bundle("prelocal").path
    start = "from sjepa_deploy.cli.stream import main; main()"
    arguments = [bundle, "--source", "synthetic", "--dashboard", "--dashboard-address", "127.0.0.1:0"]
    with subprocess.Popen([sys.executable, "-c", start, *arguments], stdout=subprocess.PIPE, text=True) as process:
        try:
            url = next(line for line in process.stdout if line.startswith("dashboard: ")).split()[1]
            browser.open(url)
            browser.wait("rows.length > 10")
            shown = browser.run("return state.decisions")
            browser.wait(f"state.decisions > {shown + 5}")
            assert browser.text("#state") == "Decoding"
            assert browser.text("#bundle") == bundle.name
            assert browser.run("return document.querySelectorAll('#map title').length") == 8
            assert not browser.run("return document.getElementById('random').hidden")
            browser.look()
            assert (browser.errors, set(browser.requests)) == ([], {url, f"{url}events"})
            process.send_signal(signal.SIGINT)
            browser.wait("ended && state.state === 'stopped'")
            last = browser.run("return state.decisions")
            printed = process.stdout.read()
        finally:
            process.kill()
    assert process.returncode == 0
    assert f"stopped, {last} decisions" in printed
