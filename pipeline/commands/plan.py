"""`rlhf plan`: what a launch needs and costs."""

from __future__ import annotations

import argparse
import dataclasses
import json


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", help="recipe folder")
    parser.add_argument("--gpus", type=int, default=1, help="devices")
    parser.add_argument("--gpu", required=True, metavar="NAME", help="of pipeline/planning/devices.yaml, e.g. h100, l4")
    parser.add_argument("--devices", metavar="FILE", help="YAML with devices of your own, in the same form")
    parser.add_argument("--accelerate", metavar="FILE", help="an accelerate config; default: data-parallel")
    parser.add_argument("--mfu", type=float, default=0.4, help="share of the peak that training reaches")
    parser.add_argument("--generation-mfu", type=float, default=0.05, help="share of it while PPO generates")
    parser.add_argument("--prompt-tokens", type=float, help="mean prompt of PPO; default: that of the data")
    parser.add_argument("--response-tokens", type=float, help="mean response of PPO; default: the longest allowed")
    parser.add_argument("--data-root", help="what relative dataset paths are relative to")
    parser.add_argument("--parent", help="model that the first stage starts from, instead of the recipe's")
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> int:
    from pipeline.planning.plan import PlanOptions, plan
    from pipeline.planning.table import print_plan
    from pipeline.training.logs import quiet_libraries

    quiet_libraries()
    report = plan(PlanOptions(**{field.name: getattr(args, field.name) for field in dataclasses.fields(PlanOptions)}))
    if args.json:
        print(json.dumps(report, indent=2, ensure_ascii=False))
    else:
        print_plan(report)
    return 0
