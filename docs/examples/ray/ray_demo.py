"""Conversations on a cluster of two engine actors, killed while they answer.

The cluster is on this machine. Every answer is computed twice, undisturbed and with actors killed;
if they differ, the exit code is 1.
"""
# pyright: reportUnknownMemberType=false, reportUnknownArgumentType=false

from __future__ import annotations

import argparse
import asyncio
import logging
import os
import signal
import sys
from collections.abc import Awaitable, Callable, Mapping, Sequence
from itertools import takewhile
from typing import cast
from uuid import UUID, uuid4

import ray

from inference_session import Session
from llama_model import random_model
from numpy_llama import LlamaEngine
from ray_cluster import Actor, Cluster, kill
from smollm2 import ChatTokenizer, find_weights, load


QUESTIONS = (
    "Why is the sky blue?",
    "What is the capital of France?",
    "What do bees make?",
    "Write a haiku about the sea.",
)
SEEDS = (None, None, 1, 2)


def main() -> int:
    """Run the program and return its exit code."""
    parser = argparse.ArgumentParser(prog="ray_demo.py", description=__doc__)
    parser.add_argument("--random", action="store_true", help="use a small model that says nothing")
    parser.add_argument(
        "--max-tokens", type=int, default=30, metavar="N", help="tokens in an answer (default: 30)"
    )
    arguments = parser.parse_args()
    if not 3 <= arguments.max_tokens <= 400:
        parser.error("argument --max-tokens: from 3 to 400")
    start_ray()
    try:
        return asyncio.run(show(tokens_each=arguments.max_tokens, random=arguments.random))
    finally:
        ray.shutdown()


def start_ray(cpus: int = 2) -> None:
    """Start Ray on this machine alone; its processes have the import path of this one."""
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    environment = {"PYTHONPATH": os.pathsep.join(sys.path), "OPENBLAS_NUM_THREADS": "1"}
    ray.init(
        address="local",  # not a cluster that the environment or an earlier start names
        num_cpus=cpus,
        include_dashboard=False,
        object_store_memory=100 * 2**20,
        log_to_driver=False,
        logging_level=logging.ERROR,
        runtime_env={"env_vars": environment},
        _node_ip_address="127.0.0.1",
    )


async def show(*, tokens_each: int, random: bool) -> int:
    """Have all conversations twice, and return the exit code."""
    tokenizer = None if random else load(find_weights())[1]
    prompts = [encode(question, tokenizer) for question in QUESTIONS]
    ids = [uuid4() for _ in QUESTIONS]
    async with Cluster(random_engine if random else smollm2_engine) as cluster:
        print(f"2 actors, {len(ids)} conversations of {tokens_each} tokens, undisturbed.")
        undisturbed = await converse(cluster, ids, prompts, tokens_each, {})
        print("Once more, under the same ids:")
        deaths = {tokens_each // 3: kill_process, tokens_each * 2 // 3: kill_actor}
        again = await converse(cluster, ids, prompts, tokens_each, deaths)
        print(f"A session sent by mistake is a TypeError: {await send_a_session(cluster)}")
    for question, seed, answer, expected in zip(QUESTIONS, SEEDS, again, undisturbed, strict=True):
        how = "the likeliest tokens" if seed is None else f"drawn with seed {seed}"
        same = "exactly as undisturbed" if answer == expected else "NOT AS UNDISTURBED"
        text = f"\n  {first_turn(answer, tokenizer)}" if tokenizer else ""
        print(f"\n{question} ({how}, {same}){text}")
    return 0 if again == undisturbed else 1


def random_engine() -> LlamaEngine:
    """Make an engine, in an actor."""
    return LlamaEngine(random_model(1))


def smollm2_engine() -> LlamaEngine:
    """Make an engine, in an actor; every machine has the weights already."""
    return LlamaEngine(load(find_weights())[0])


def encode(question: str, tokenizer: ChatTokenizer | None) -> list[int]:
    """Return the tokens of a question."""
    if tokenizer is None:
        return list(question.encode())
    return tokenizer.encode_chat([("user", question)])


def first_turn(answer: Sequence[int], tokenizer: ChatTokenizer) -> str:
    """Return the text of an answer, up to the model's end of turn."""
    return tokenizer.decode(list(takewhile(tokenizer.end_of_turn.__ne__, answer)))


async def converse(
    cluster: Cluster,
    ids: Sequence[UUID],
    prompts: Sequence[Sequence[int]],
    tokens_each: int,
    deaths: Mapping[int, Callable[[Actor], Awaitable[str]]],
) -> list[list[int]]:
    """Return the answers to all prompts, computed side by side.

    Each of `deaths` happens when the first answer has that number of tokens.
    """
    for session_id, prompt, seed in zip(ids, prompts, SEEDS, strict=True):
        await cluster.open(prompt, session_id=session_id, seed=seed)

    async def answer(session_id: UUID) -> None:
        for count in range(tokens_each):
            step = asyncio.create_task(cluster.decode(session_id))
            if session_id == ids[0] and count in deaths:
                actor = await cluster.actor(session_id)
                held = [await cluster.actor(other) for other in ids].count(actor)
                how = await deaths[count](actor)
                print(f"  after {count} tokens, the actor of {held} conversations dies: {how}")
            await step

    await asyncio.gather(*map(answer, ids))
    answers = [cluster.tokens(session_id) for session_id in ids]
    for session_id in ids:
        await cluster.close(session_id)
    return [answer[len(prompt) :] for answer, prompt in zip(answers, prompts, strict=True)]


async def kill_process(actor: Actor) -> str:
    """Kill the process of an actor at once."""
    pid = await actor.pid.remote()
    os.kill(pid, signal.SIGKILL)
    return f"SIGKILL to process {pid}"


async def kill_actor(actor: Actor) -> str:
    """Let Ray end an actor."""
    kill(actor)
    return "ray.kill"


async def send_a_session(cluster: Cluster) -> str:
    """Make a mistake, and return the library's error message."""
    session_id = await cluster.open([1])
    with Session() as session:
        try:
            actor = await cluster.actor(session_id)
            await actor.prefill.remote(cast("UUID", session), [1])
        except TypeError as error:
            return str(error.__cause__)
    return "no error"


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
