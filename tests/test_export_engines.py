"""Exported models in other people's engines: lm-eval, `transformers serve`, llama.cpp (tests/requirements-slow.txt)."""
import itertools
import json
import os
import socket
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path
from urllib.request import Request, urlopen

import pytest
import torch

pytest.importorskip("transformers")

from exporting import MIXED_TEXT, random_model, run_export  # noqa: E402
from test_model import LLAMA  # noqa: E402

from chat import Chat  # noqa: E402
from evaluate import EvaluateConfig, score_choices  # noqa: E402
from runtime.device import Machine  # noqa: E402
from sampling import GREEDY, generate, generate_texts  # noqa: E402
from tasks.multiple_choice import parse_choice  # noqa: E402
from tokenizer import END_OF_MESSAGE, Tokenizer  # noqa: E402

pytestmark = pytest.mark.slow
OFFLINE = os.environ | {"HF_HUB_OFFLINE": "1"}


@pytest.fixture(scope="module")
def tokenizer(english) -> Tokenizer:
    return Tokenizer.train(english[:40], 600)


def post(url: str, body: dict) -> dict:
    request = Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urlopen(request, timeout=300) as response:
        return json.load(response)


# -- lm-eval ----------------------------------------------------------------------------------------------------------

def run_lm_eval(model_folder: Path, tasks: dict[str, dict], rows: list[dict], folder: Path) -> tuple[dict, dict[str, list]]:
    """lm-eval's results on the rows, and each task's samples in the order of the rows. `folder` is for its files."""
    folder.mkdir()
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    data = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"validation": str(folder / "rows.jsonl")}},
            "validation_split": "validation", "doc_to_text": "{{ctx}}"}
    for name, task in tasks.items():
        (folder / f"{name}.yaml").write_text(json.dumps({"task": name, **data, **task}))  # JSON is YAML
    # not in the repository: our evaluate.py would shadow Hugging Face's `evaluate`
    subprocess.run([sys.executable, "-m", "lm_eval", "--model=hf", "--device=cpu", "--batch_size=4", "--log_samples",
                    f"--model_args=pretrained={model_folder},trust_remote_code=True,add_bos_token=True",
                    f"--tasks={','.join(tasks)}", f"--include_path={folder}", f"--output_path={folder / 'out'}"],
                   cwd=folder, env=OFFLINE, check=True)
    result, = (folder / "out").rglob("results_*.json")
    samples = {}
    for name in tasks:
        path, = (folder / "out").rglob(f"samples_{name}_*.jsonl")
        samples[name] = sorted(map(json.loads, path.read_text().splitlines()), key=lambda sample: sample["doc_id"])
    return json.loads(result.read_text())["results"], samples


def test_lm_eval_scores_equal_evaluates(tokenizer, english, tmp_path):
    """Of our own code in transformers; some contexts are longer than the model's."""
    pytest.importorskip("lm_eval")
    block_size = 64
    model = random_model(block_size=block_size)
    words = iter(word for word in " ".join(english[50:60]).split() if len(word) < 20)
    take = lambda n: " ".join(itertools.islice(words, n))
    rows = [{"ctx": take(i % 40 + 1), "endings": [take(n) for n in (2, 3, 1, 3)], "label": i % 4} for i in range(100)]
    rows.append({"ctx": "naïve café", "endings": ["élan ü", "plain", "文字 🙂", "—"], "label": 1})
    n_tokens = [len(tokenizer.encode(row["ctx"])) for row in rows]
    assert min(n_tokens) < 10 and sum(n > block_size for n in n_tokens) > 10
    results, samples = run_lm_eval(run_export(model, tokenizer, tmp_path), {
        "choice": {"output_type": "multiple_choice", "doc_to_target": "label", "doc_to_choice": "endings",
                   "metric_list": [{"metric": metric} for metric in ("acc", "acc_norm")]},
        "answer": {"output_type": "generate_until", "doc_to_target": "{{endings[0]}}",
                   "generation_kwargs": {"until": ["e"], "max_gen_toks": 8, "do_sample": False},
                   "metric_list": [{"metric": "exact_match"}]}}, rows, tmp_path / "lm_eval")
    scores, scored_rows = score_choices(model, tokenizer, Machine(torch.device("cpu"), "fp32"),
                                        [parse_choice(row, "") for row in rows],
                                        EvaluateConfig(task="choice", dataset="rows"))
    for row, sample in zip(scored_rows, samples["choice"], strict=True):
        assert [float(score) for score, _ in sample["filtered_resps"]] == pytest.approx(row["scores"], abs=1e-3)
    for metric in ("acc", "acc_norm"):
        assert results["choice"][f"{metric},none"] == scores[metric].value
    for row, sample in zip(rows, samples["answer"], strict=True):
        ids = [tokenizer.separator_id, *tokenizer.encode(row["ctx"])][8 - block_size:]
        texts = generate_texts(model, tokenizer, [ids], 8, GREEDY, ["e"])
        assert sample["resps"][0][0] == "".join(text for _, text in texts)


# -- transformers serve -----------------------------------------------------------------------------------------------

@contextmanager
def serve(folder: Path, log_path: Path):
    """The URL at which `transformers serve` completes chats with the model."""
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
    with log_path.open("w") as log:
        command = [sys.executable, "-m", "transformers.cli.transformers", "serve", str(folder), "--device=cpu"]
        server = subprocess.Popen([*command, "--host=127.0.0.1", f"--port={port}"], env=OFFLINE, stdout=log, stderr=log)
        try:
            for _ in range(600):
                try:
                    urlopen(f"http://127.0.0.1:{port}/health", timeout=60).close()
                    break
                except OSError:
                    assert server.poll() is None, log_path.read_text()
                    time.sleep(0.2)
            yield f"http://127.0.0.1:{port}/v1/chat/completions"
        finally:
            server.terminate()
            server.wait(60)


def test_served_answers_equal_chats(tokenizer, tmp_path):
    """The first answer, the answer to a second turn, and an answer that the end-of-message token ends at once."""
    for library in ("transformers.cli.serve", "fastapi", "uvicorn", "openai"):
        pytest.importorskip(library)
    model = random_model(block_size=128, **LLAMA)
    folder = run_export(model, tokenizer, tmp_path)

    def complete(messages: list[dict], **options) -> dict:
        choice, = post(url, {"model": str(folder), "messages": messages, "temperature": 0, "max_tokens": 12, **options})[
            "choices"]
        assert choice["message"]["role"] == "assistant"
        return choice

    with serve(folder, tmp_path / "log") as url:
        for question in ("What is an array?", " Why — été 🙂?\n"):
            messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": question}]
            expected = "".join(Chat(model, tokenizer, GREEDY, 12, system="Be brief.").answer(question))
            assert complete(messages)["message"]["content"] == expected and len(expected) > 10
        messages += [{"role": "assistant", "content": "42."}, {"role": "user", "content": "Why?"}]
        ids = tokenizer.encode_chat(messages, True)[0]
        expected = "".join(text for _, text in generate_texts(model, tokenizer, [ids], 12, GREEDY))
        assert complete(messages)["message"]["content"] == expected and len(expected) > 10
        ended = complete(messages, logit_bias={str(tokenizer.special_tokens[END_OF_MESSAGE]): 1000.0})
        assert ended["finish_reason"] == "stop" and not ended["message"]["content"]


# -- llama.cpp --------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("pattern", ["gpt4", "gpt2"])
def test_llama_cpp_ids_and_greedy_tokens_equal_ours(pattern, english, tmp_path):
    xllamacpp = pytest.importorskip("xllamacpp")
    tokenizer = Tokenizer.train(english[:40], 600, pattern)
    model = random_model(**LLAMA | {"n_head": 4, "head_size": 16, "n_kv_head": 2, "block_size": 128})
    params = xllamacpp.CommonParams()
    params.model.path = str(run_export(model, tokenizer, tmp_path, "--gguf") / "model.gguf")
    params.n_ctx, params.n_gpu_layers = 128, 0
    server = xllamacpp.Server(params)
    url = server.listening_address
    for text in (MIXED_TEXT, *english[40:60]):
        body = {"content": text[:3000], "add_special": False, "parse_special": False}
        assert post(f"{url}/tokenize", body)["tokens"] == tokenizer.encode(text[:3000])
    for prompt in ("The numpy array", "def f(x):"):
        completion = post(f"{url}/completion", {"prompt": prompt, "n_predict": 24, "temperature": 0, "top_k": 1,
                                                "ignore_eos": True, "return_tokens": True})
        ids = torch.tensor([tokenizer.separator_id, *tokenizer.encode(prompt)])
        assert completion["tokens"] == [int(new) for new in generate(model, [ids], 24, GREEDY)]
