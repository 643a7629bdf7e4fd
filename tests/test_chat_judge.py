"""A judge behind an OpenAI-compatible endpoint, asked over HTTP: a server in this process stands for it."""

import base64
import io
import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
from PIL import Image

from mmrl.recipe import RewardConfig
from mmrl.registry import ComponentError, build
from mmrl.rewards import Isolated
from mmrl.sample import Prompt, Sample
from mmrl.task import build_reward


@pytest.fixture
def server():
    """(url, requests, answer): requests received, and a list of functions request -> (status, reply)."""
    requests, script = [], []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            requests.append((self.path, self.headers.get("Authorization"), body))
            status, reply = script[0](body)
            text = json.dumps({"choices": [{"message": {"content": reply}}]}).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)

        def log_message(self, *args):
            pass

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=http.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{http.server_port}/v1", requests, script
    http.shutdown()
    thread.join()
    http.server_close()


def judge(url, **options):
    return build("rewards", "rewards.0", "chat_judge", {"url": url, "model": "judge", "retries": 0} | options)


def sample(output, **inputs):
    return Sample(Prompt("p", {"question": "2 + 2 = {?}"} | inputs, {"answer": "4", "topic": "sums"}), output, 0)


def test_the_number_of_the_reply_becomes_a_reward(server, monkeypatch):
    url, requests, script = server
    monkeypatch.setenv("JUDGE_KEY", "secret")
    replies = {"four": "Score: 3, no: **Score: 8**", "five": "score -1", "six": "no idea", "seven": "Score: 11"}
    script.append(lambda body: (200, next(r for k, r in replies.items() if k in body["messages"][-1]["content"])))
    ask = judge(
        url, prompt="{question} {topic} {reference}: {output} {unknown}", system="Be fair.", api_key_env="JUDGE_KEY"
    )
    assert ask([sample(x) for x in ("four", "five", "four", "six", "seven")]) == [0.8, None, 0.8, None, None]
    assert ask.failures == {"reply": 3}
    assert len(requests) == 4  # equal questions once
    path, key, body = next(r for r in requests if "four" in str(r))
    assert (path, key, body["model"], body["temperature"]) == ("/v1/chat/completions", "Bearer secret", "judge", 0.0)
    assert body["messages"][0] == {"role": "system", "content": "Be fair."}
    assert body["messages"][1] == {"role": "user", "content": "2 + 2 = {?} sums 4: four {unknown}"}


def test_pictures_of_prompts_and_outputs_are_shown(server, tmp_path):
    url, requests, script = server
    script.append(lambda body: (200, "Score: 5"))
    Image.new("RGB", (3, 2), "red").save(tmp_path / "a.png")
    assert judge(url)([sample("x", images=[str(tmp_path / "a.png")]), sample(torch.zeros(1, 4, 5))]) == [0.5, 0.5]
    sizes = set()
    for _, _, body in requests:
        picture, text = body["messages"][0]["content"]
        data = base64.b64decode(picture["image_url"]["url"].removeprefix("data:image/png;base64,"))
        sizes.add((Image.open(io.BytesIO(data)).size, "the last picture" in text["text"]))
    assert sizes == {((3, 2), False), ((5, 4), True)}


def test_a_busy_server_is_asked_again_and_a_refusal_is_not(server):
    url, requests, script = server
    script.append(lambda body: (503, "") if len(requests) < 2 else (200, "Score: 10"))
    assert judge(url, retries=1)([sample("x")]) == [1.0] and len(requests) == 2
    requests.clear()
    script[0] = lambda body: (401, "")
    ask = judge(url, retries=3)
    assert ask([sample("x")]) == [None] and len(requests) == 1 and ask.failures == {"request": 1}


def test_a_server_that_hangs_or_is_gone_costs_its_samples_alone(server):
    url, _, script = server
    script.append(lambda body: (time.sleep(1.0) or (200, "Score: 1")) if "slow" in str(body) else (200, "Score: 1"))
    began = time.monotonic()
    assert judge(url, request_s=0.3)([sample("slow"), sample("quick")]) == [None, 0.1]
    assert time.monotonic() - began < 5
    assert judge("http://127.0.0.1:9/v1")([sample("x")]) == [None]


def test_it_runs_in_a_process_of_its_own(server):
    url, _, script = server
    script.append(lambda body: (200, "Score: 4"))
    reward = build_reward(RewardConfig(name="chat_judge", url=url, model="judge"), "rewards.0")
    assert isinstance(reward, Isolated) and reward.timeout_s == 600
    assert reward([sample("x"), sample("y")]) == [0.4, 0.4]


@pytest.mark.parametrize(
    "options, message",
    [
        ({"url": "localhost:8000"}, "must begin with http"),
        ({"low": 10.0}, "low=10.0 must lie below high=10.0"),
        ({"pattern": "Score"}, "needs a group"),
        ({"timeout": 3}, "unknown key rewards.0.timeout"),
    ],
)
def test_options_that_cannot_be_used(options, message):
    with pytest.raises((ComponentError, ValueError), match=message):
        judge(**{"url": "http://127.0.0.1:9/v1"} | options)
