"""Copy some of ../shared's encoding, parser and mask cases to this folder.

    python tests/data/sft/make_cases.py ../shared/cases
"""

import json
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
SHARED = Path(sys.argv[1])
NOTICE = "Prompts within and official_cases: Copyright (c) DeepSeek, MIT License"
WANTED = {
    "encoding_cases": [
        "chat_system_multiturn", "thinking_drop_default", "thinking_keep_all", "thinking_effort_max",
        "tools_call_two_results_sorted", "tools_arguments_not_json", "tools_empty_arguments",
        "tool_result_content_list", "tool_then_user_same_turn", "latest_reminder_after_user",
        "task_action_chat", "task_title", "wo_eos_prefix", "context_suffix", "err_unknown_role",
        "err_bad_task", "official_3",
    ],
    "encoding_recipe_cases": ["none", "low", "high", "max", "chat_max", "injection"],
    "loss_mask_cases": [
        "chat_multi_system", "thinking_keep", "tools_argument_ignored", "unicode_emoji", "assistant_first", "wo_eos",
        "title_task", "bad_mode",
    ],
}  # fmt: skip

for name, wanted in WANTED.items():
    whole = json.loads((SHARED / f"{name}.json").read_text())
    part = {"notice": NOTICE, "source": whole["source"]}
    for key in ("cases", "official_cases"):
        part[key] = [case for case in whole.get(key, []) if case["name"] in wanted]
    part["parse_cases"] = whole.get("parse_cases", [])
    (HERE / f"{name}.json").write_text(json.dumps(part, ensure_ascii=False, separators=(",", ":")) + "\n")
