"""What the server refuses: with the right status and one line that says why, and it goes on."""

import asyncio
import base64
import io
import json
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image

from tests.train.inference.server.conftest import ToldEngine, encoded
from train.inference.server.app import Service, make_app
from train.inference.server.limits import Limits

_PICTURE = encoded()


def _refused(answer, status, *words):
    assert answer.status_code == status, answer.text
    told = answer.json()
    assert set(told) == {"error", "request_id"}
    assert "\n" not in told["error"]
    assert told["request_id"] == answer.headers["x-request-id"]
    for word in words:
        assert word in told["error"]


def _alive(client):
    return client.post("/predict", content=_PICTURE).status_code == 200


@pytest.fixture
def client(serving):
    return serving(ToldEngine(), body_bytes=100_000, pixels=10_000)


def _header_of(kind, width, height):
    """The beginning of a file that claims to be that large."""
    file = io.BytesIO()
    Image.new("RGB", (8, 8)).save(file, kind)
    content = bytearray(file.getvalue())
    if kind == "PNG":
        import zlib

        content[16:24] = width.to_bytes(4, "big") + height.to_bytes(4, "big")
        content[29:33] = zlib.crc32(content[12:29]).to_bytes(4, "big")
    else:
        content[18:26] = width.to_bytes(4, "little") + height.to_bytes(4, "little")  # BMP
    return bytes(content)


@pytest.mark.parametrize(
    ("content", "headers", "status", "words"),
    [
        (b"", {}, 422, "it is empty"),
        (b"hello", {}, 415, "in none of the formats JPEG, PNG, WEBP, GIF, BMP"),
        (b"II*\0" + bytes(100), {}, 415, "in none of the formats"),  # TIFF
        (_PICTURE[:200], {}, 422, "cannot be read"),
        (b"\xff\xd8\xff\xe0", {}, 422, "damaged"),
        (encoded((120, 100)), {}, 413, "has 120 x 100 pixels; at most 10000"),
        (_header_of("PNG", 60_000, 60_000), {}, 413, "pixels"),  # beyond what Pillow itself takes
        (_header_of("BMP", 20_000, 2_000), {}, 413, "has 20000 x 2000 pixels"),
        (bytes(100_001), {}, 413, "more than 100000 bytes"),
        (_PICTURE, {"Content-Type": "text/plain"}, 415, "multipart/form-data or application/json"),
        (_PICTURE, {"Content-Encoding": "gzip"}, 415, "Content-Encoding"),
        (b"{", {"Content-Type": "application/json"}, 400, "no JSON"),
        (b"[" * 50_000, {"Content-Type": "application/json"}, 400, "nested too deeply"),
        (b'{"picture": 1}', {"Content-Type": "application/json"}, 400, "base64"),
        (b'{"picture": "%%%"}', {"Content-Type": "application/json"}, 400, "base64"),
        (b'{"pictures": []}', {"Content-Type": "application/json"}, 400, "no picture"),
        (b'{"pictures": {}, "n": 1}', {"Content-Type": "application/json"}, 400, "is an object with"),
        (b'{"picture": "", "top_k": true}', {"Content-Type": "application/json"}, 400, "top_k"),
        (b"--x--", {"Content-Type": "multipart/form-data"}, 400, "boundary"),
        (b"--x\r\n", {"Content-Type": "multipart/form-data; boundary=x"}, 400, ""),
    ],
    ids=lambda value: None if isinstance(value, bytes | dict) else str(value),
)
def test_what_cannot_be_answered_is_refused_in_one_line(client, content, headers, status, words):
    _refused(client.post("/predict", content=content, headers=headers), status, words)
    assert _alive(client)


def test_the_body_is_counted_whatever_its_header_says(client):
    chunks = (bytes(1000) for _ in range(150))  # without a length
    _refused(client.post("/predict", content=chunks), 413, "more than 100000 bytes")


@pytest.mark.parametrize("query", ["top_k=0", "top_k=x", "top_k=²", "attention=maybe", "topk=3"])
def test_a_mistake_in_the_query_is_told(client, query):
    _refused(client.post(f"/predict?{query}", content=_PICTURE), 400, query.partition("=")[0])


def test_a_field_of_a_form_that_is_no_file_is_told(client):
    _refused(client.post("/predict", data={"top_k": "3"}, files={"a": _PICTURE}), 400, "top_k")


def test_a_form_that_ends_within_a_picture_is_not_answered_for_those_before(client):
    head = b'\r\n--x\r\nContent-Disposition: form-data; name="a"; filename="b"\r\n\r\n'
    form = {"Content-Type": "multipart/form-data; boundary=x"}
    assert client.post("/predict", content=2 * (head + _PICTURE) + b"\r\n--x--\r\n", headers=form).status_code == 200
    _refused(client.post("/predict", content=2 * (head + _PICTURE), headers=form), 400, "the form cannot be read")


def test_one_damaged_picture_of_several_is_named(client):
    texts = [base64.b64encode(one).decode() for one in (_PICTURE, _PICTURE[:100], _PICTURE)]
    _refused(client.post("/predict", json={"pictures": texts}), 422, "picture 2 cannot be read")


def test_unknown_paths_and_wrong_methods(client):
    _refused(client.get("/nowhere"), 404, "there is no /nowhere")
    _refused(client.post("/predict/", content=_PICTURE), 404)
    answer = client.get("/predict")
    _refused(answer, 405, "/predict does not take GET")
    assert answer.headers["allow"] == "POST"


def test_attention_of_a_model_that_does_not_tell_it(client):
    _refused(client.post("/predict?attention=true", content=_PICTURE), 400, "does not tell")


@pytest.mark.parametrize("status", [503, 429])
def test_more_pictures_than_the_server_holds_are_refused_at_once(serving, status):
    engine = ToldEngine()
    engine.go.clear()
    client = serving(engine, pictures=3, overload_status=status)
    with ThreadPoolExecutor(4) as pool:
        accepted = [pool.submit(client.post, "/predict", content=_PICTURE) for _ in range(3)]
        while client.service.admission.taken < 3:
            time.sleep(0.001)
        refused = client.post("/predict", content=_PICTURE)
        _refused(refused, status, "the server is full: 3 pictures")
        assert int(refused.headers["retry-after"]) >= 1
        assert client.get("/readyz").status_code == 200
        engine.go.set()
        assert [one.result().status_code for one in accepted] == [200] * 3
    assert client.service.admission.taken == 0
    several = [("a", _PICTURE)] * 4
    _refused(client.post("/predict", files=several), 413, "4 pictures in a request; at most 3")
    assert client.service.admission.taken == 0
    assert _alive(client)


def test_a_request_that_takes_too_long_leaves_the_queue(serving):
    engine = ToldEngine(sizes=(1,))
    engine.go.clear()
    client = serving(engine, deadline=0.2)
    with ThreadPoolExecutor(3) as pool:
        late = [pool.submit(client.post, "/predict", content=_PICTURE) for _ in range(3)]
        for one in late:
            _refused(one.result(), 504, "no answer within 0.2 s")
    engine.go.set()
    assert _alive(client)
    assert engine.batches == [1, 1]  # the first, which had begun, and the last: the others were never computed


def test_an_upload_that_takes_too_long_is_ended(serving):
    client = serving(ToldEngine(), deadline=0.1)

    async def ask():
        never = asyncio.Event()
        sent = []

        async def receive():
            await never.wait()

        async def send(message):
            sent.append(message)

        await client.app(_scope(), receive, send)
        return sent

    start, body = client.portal.call(ask)
    assert start["status"] == 408
    assert "not read within 0.1 s" in json.loads(body["body"])["error"]
    assert client.service.admission.taken == 0


def _scope():
    return {
        "type": "http",
        "method": "POST",
        "path": "/predict",
        "raw_path": b"/predict",
        "query_string": b"",
        "headers": [],
        "client": ("test", 1),
    }


def test_what_nobody_waits_for_is_not_computed(serving):
    engine = ToldEngine(sizes=(1,))
    engine.go.clear()
    lines = []
    client = serving(engine, log=lines.append)
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(client.post, "/predict", content=_PICTURE)
        assert engine.began.wait(60)  # the engine is busy

        async def ask_and_go():
            gone = asyncio.Event()
            messages = iter([{"type": "http.request", "body": _PICTURE, "more_body": False}])

            async def receive():
                try:
                    return next(messages)
                except StopIteration:
                    await gone.wait()
                    return {"type": "http.disconnect"}

            async def send(message):
                pass

            asking = asyncio.create_task(client.app(_scope(), receive, send))
            while not client.service.batcher.waiting:
                await asyncio.sleep(0.001)
            gone.set()
            await asking
            return client.service.batcher.waiting

        assert client.portal.call(ask_and_go) == 0
        assert json.loads(lines[-1])["status"] == 499
        engine.go.set()
        assert first.result().status_code == 200
    assert engine.batches == [1]


def test_a_failure_of_the_devices_is_told_without_its_reasons_and_does_not_last(serving, caplog):
    engine = ToldEngine()
    client = serving(engine)
    engine.fails = True
    answer = client.post("/predict", content=_PICTURE)
    _refused(answer, 500, "its log tells why")
    assert "RESOURCE_EXHAUSTED" not in answer.text
    assert "RESOURCE_EXHAUSTED" in caplog.text
    engine.fails = False
    assert _alive(client)


def test_before_the_programs_are_compiled_and_once_it_ends_it_lives_and_is_not_ready(serving):
    engine, began, go = ToldEngine(), threading.Event(), threading.Event()

    def compile():
        began.set()
        assert go.wait(60)

    client = serving(ToldEngine())
    service = client.service
    for flag, word in (("starting", "starting"), ("ending", "ending")):
        setattr(service, flag, True)
        assert client.get("/healthz").status_code == 200
        answer = client.get("/readyz")
        assert (answer.status_code, answer.json()) == (503, {"status": word})
        refused = client.post("/predict", content=_PICTURE)
        _refused(refused, 503)
        assert refused.headers["retry-after"] == "1"
        setattr(service, flag, False)
    engine.compile = compile
    waiting = Service(engine, Limits(pictures=1))

    async def start():
        starting = asyncio.create_task(waiting.start())
        await asyncio.to_thread(began.wait, 60)
        before = waiting.is_ready
        go.set()
        await starting
        return before, waiting.is_ready

    assert asyncio.run(start()) == (False, True)


def test_a_token_is_asked_for_but_by_probes(serving):
    client = serving(ToldEngine(), token="sesame")
    for path in ("/healthz", "/readyz"):
        assert client.get(path).status_code == 200
    for header in (None, "sesame", "Bearer", "Bearer Sesame", "Basic sesame", "Bearer sesame2", "Bearer ä".encode()):
        answer = client.post("/predict", content=_PICTURE, headers=header and {"Authorization": header})
        _refused(answer, 401, "bearer token")
        assert answer.headers["www-authenticate"] == "Bearer"
    assert client.get("/metrics").status_code == 401
    for scheme in ("Bearer", "bearer"):
        headers = {"Authorization": f"{scheme} sesame"}
        assert client.post("/predict", content=_PICTURE, headers=headers).status_code == 200
    assert "sesame" not in repr(client.service.limits)


def test_a_request_has_an_id_its_own_where_it_can_be_one(client):
    assert client.get("/healthz", headers={"X-Request-ID": "mine-1"}).headers["x-request-id"] == "mine-1"
    for odd in ("a b", "x" * 65, "ä".encode(), '"'):
        given = client.get("/healthz", headers={"X-Request-ID": odd}).headers["x-request-id"]
        assert len(given) == 32
        assert given != client.get("/healthz").headers["x-request-id"]


def test_the_log_has_a_line_for_each_request_and_nothing_of_the_picture(serving):
    lines = []
    client = serving(ToldEngine(), log=lines.append)
    text = base64.b64encode(_PICTURE).decode()
    client.post("/predict?top_k=1", json={"pictures": [text, text]})
    client.post("/predict", content=b"secret")
    client.get("/healthz")
    first, second = map(json.loads, lines)
    assert first.keys() == {"time", "request_id", "client", "method", "path", "status", "seconds", "pictures"}
    assert (first["method"], first["path"], first["status"], first["pictures"]) == ("POST", "/predict", 200, 2)
    assert second["status"] == 415
    assert not any(word in line for line in lines for word in (text[:20], "secret", "top_k"))


def test_counters_tell_what_was_answered(serving):
    client = serving(ToldEngine())
    client.post("/predict", files=[("a", _PICTURE)] * 2)
    client.post("/predict", content=b"x")
    client.get("/made-up-1")
    client.get("/made-up-2")
    text = client.get("/metrics").text
    for line in (
        'crossvit_requests_total{endpoint="predict",status="200"} 1.0',
        'crossvit_requests_total{endpoint="predict",status="415"} 1.0',
        'crossvit_requests_total{endpoint="none",status="404"} 2.0',
        "crossvit_decode_seconds_count 2.0",
        "crossvit_queue_seconds_count 2.0",
        "crossvit_batch_pictures_sum 2.0",
        "crossvit_queue_pictures 0.0",
        "crossvit_held_pictures 0.0",
        "crossvit_ready 1.0",
    ):
        assert f"\n{line}\n" in text
    assert "made-up" not in text


def test_bodies_of_noise_are_refused_and_the_server_lives(client):
    rng = np.random.default_rng(0)
    whole = {
        "image/png": _PICTURE,
        "image/jpeg": encoded(kind="JPEG"),
        "image/webp": encoded(kind="WEBP"),
        "image/gif": encoded(kind="GIF"),
        "image/bmp": encoded(kind="BMP"),
        "application/json": json.dumps({"picture": base64.b64encode(_PICTURE).decode()}).encode(),
        "multipart/form-data; boundary=x": b'--x\r\nContent-Disposition: form-data; name="a"; filename="b"\r\n\r\n'
        + _PICTURE
        + b"\r\n--x--\r\n",
    }
    statuses = set()
    for number in range(300):
        kind = list(whole)[number % len(whole)]
        content = np.frombuffer(whole[kind], np.uint8).copy()
        if number % 3 == 0:
            content = content[: rng.integers(len(content))]
        else:  # in the first bytes too, where headers are
            content[rng.integers(0, len(content), 20)] = rng.integers(0, 256, 20)
            content[rng.integers(0, 40, 5)] = rng.integers(0, 256, 5)
        answer = client.post("/predict", content=content.tobytes(), headers={"Content-Type": kind})
        # a picture with a few other pixels is one
        assert answer.status_code in (200, 400, 413, 415, 422), (number, kind, answer.text)
        statuses.add(answer.status_code)
    assert statuses >= {400, 415, 422}
    assert _alive(client)
    assert client.service.admission.taken == 0


def test_two_servers_in_a_process_do_not_share_their_counters():
    services = [Service(ToldEngine(), Limits(pictures=1)) for _ in range(2)]
    services[0].metrics.count("predict", 200, 0.1)
    assert b'endpoint="predict"' not in services[1].metrics.text()
    assert make_app(services[0]) is not None


def _raw(address, content, *, seconds=10):
    """All that a server answers until it closes the connection."""
    host, _, port = address.partition(":")
    with socket.create_connection((host, int(port)), timeout=seconds) as client:
        client.sendall(content)
        answer = b""
        while part := client.recv(2**16):
            answer += part
        return answer


_REQUEST = b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n%b" % (len(_PICTURE), _PICTURE)


@pytest.mark.parametrize("begun", [b"", b"GET / HT", _REQUEST + b"GET /"])
def test_a_head_that_does_not_come_to_its_end_closes_the_connection(listening, begun):
    with listening(Service(ToldEngine(), Limits(pictures=4)), timeout_keep_alive=0.1) as address:
        assert _raw(address, begun)[:15] == (b"HTTP/1.1 200 OK" if begun.startswith(b"POST") else b"")


def test_what_is_no_request_behind_one_is_refused_without_a_fault_of_ours(listening, caplog):
    service = Service(ToldEngine(), Limits(pictures=4))
    with listening(service) as address:
        answer = _raw(address, _REQUEST + b"\0\r\n\r\n")
        assert answer.startswith((b"HTTP/1.1 400", b"HTTP/1.1 200"))  # which came first is chance
        assert b"HTTP/1.1 400" in answer
        while service.admission.taken:
            time.sleep(0.001)
    assert not [record for record in caplog.records if record.exc_info]


def test_a_paths_control_characters_are_escaped_and_its_length_is_bounded(serving):
    lines = []
    client = serving(ToldEngine(), log=lines.append)
    answer = client.get("/%1b%5b31m" + "a" * 5000)
    _refused(answer, 404, "there is no /\\x1b[31maaa")
    assert answer.json()["error"].isprintable()
    assert len(answer.text) < 400
    assert len(lines[-1]) < 500
