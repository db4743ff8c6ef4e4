"""`rlhf best-of`: rejection sampling (the best of n responses) for the next SFT."""

from __future__ import annotations

import argparse

from pipeline.config.rewards import reward_source
from pipeline.errors import UserError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--policy", required=True, help="folder or Hub id of the model that answers")
    parser.add_argument(
        "--reward", required=True, nargs="+", help="model folder or module:function, `*0.2` after it: weight"
    )
    parser.add_argument("--prompts", required=True, metavar="FILE", help="JSONL with a column `prompt`")
    parser.add_argument("--output", required=True, metavar="FILE", help="JSONL of prompt, response, score")
    parser.add_argument("-n", type=int, default=16, help="responses sampled per prompt")
    parser.add_argument("--max-response-tokens", type=int, default=64, help="longest response")
    parser.add_argument("--temperature", type=float, default=1.0, help="of the samples")
    parser.add_argument("--seed", type=int, default=0, help="of the samples")
    parser.add_argument(
        "--engine-url", metavar="URL", help="a vLLM server that samples (docs/engines.md); default: this process"
    )


def run(args: argparse.Namespace) -> int:
    for name in ("n", "max_response_tokens", "temperature"):
        if not 0 < getattr(args, name) < float("inf"):
            raise UserError(f"command line: {name} must be above 0")
    from pipeline.commands.demonstrations import BestOfOptions, write_demonstrations
    from pipeline.training.logs import quiet_libraries

    quiet_libraries()
    write_demonstrations(
        BestOfOptions(
            policy=args.policy,
            reward=[reward_source(text) for text in args.reward],
            prompts=args.prompts,
            output=args.output,
            n=args.n,
            max_response_tokens=args.max_response_tokens,
            temperature=args.temperature,
            seed=args.seed,
            engine_url=args.engine_url,
        )
    )
    return 0
