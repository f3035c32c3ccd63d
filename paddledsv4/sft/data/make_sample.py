"""Write sample.jsonl: 200 short conversations made up for this repository, the same on every run.

    python paddledsv4/sft/data/make_sample.py

Facts are school knowledge; weather, prices and people are invented.
"""

from __future__ import annotations

import json
import random
from pathlib import Path

SAMPLE = Path(__file__).with_name("sample.jsonl")
EACH = 40  # conversations of each of five kinds

CAPITALS = """\
France Paris, Italy Rome, Spain Madrid, Portugal Lisbon, Germany Berlin, Austria Vienna, Poland Warsaw, Norway Oslo,
Sweden Stockholm, Finland Helsinki, Denmark Copenhagen, Ireland Dublin, Greece Athens, Turkey Ankara, Egypt Cairo,
Kenya Nairobi, Ghana Accra, Peru Lima, Chile Santiago, Cuba Havana, Japan Tokyo, China Beijing, Mongolia Ulaanbaatar,
Vietnam Hanoi, Thailand Bangkok, Nepal Kathmandu, Australia Canberra, Canada Ottawa, Hungary Budapest, Romania Bucharest
"""
CAPITALS = [pair.split() for pair in CAPITALS.split(",")]
ELEMENTS = """\
hydrogen H 1, helium He 2, carbon C 6, nitrogen N 7, oxygen O 8, sodium Na 11, iron Fe 26, copper Cu 29, silver Ag 47,
gold Au 79"""
ELEMENTS = [triple.split() for triple in ELEMENTS.split(",")]
PERSONAS = ["Answer in one sentence.", "You are a patient teacher.", "Be brief.", "You are a travel guide.", None]
UNITS = [("kilometres", "metres", 1000), ("hours", "minutes", 60), ("kilograms", "grams", 1000), ("weeks", "days", 7)]
WORDS = "apple river window garden silver morning basket candle thunder pencil meadow lantern".split()
CHINESE = [("你好", "hello"), ("谢谢", "thank you"), ("早上好", "good morning"), ("再见", "goodbye"), ("水", "water"),
           ("山", "mountain"), ("朋友", "friend"), ("书", "book")]  # fmt: skip
EMOJI = [("🐱", "a cat"), ("🌧️", "rain"), ("🚲", "a bicycle"), ("🍎", "an apple"), ("🎹", "a piano"), ("🦉", "an owl"),
         ("⛵", "a sailing boat"), ("🌋", "a volcano")]  # fmt: skip
NAMES = "Ada Ben Chen Dora Emil Fatma Goran Hana Ivan Jun".split()
SKIES = ["sunny", "cloudy", "rainy", "windy", "snowy"]


def tool(name: str, description: str, **properties: str) -> dict:
    parameters = {"type": "object", "properties": {n: {"type": t} for n, t in properties.items()}}
    return {"type": "function", "function": {"name": name, "description": description, "parameters": parameters}}


WEATHER = tool("get_weather", "Weather of a city", city="string", days="integer")
STOCK = tool("count_stock", "How many of an article are in store", article="string")


def says(role: str, content: str, **more: object) -> dict:
    return {"role": role, "content": content, **more}


def system(text: str | None) -> list[dict]:
    return [says("system", text)] if text else []


def call(number: int, name: str, **arguments: object) -> dict:
    return {"id": f"c{number}", "type": "function", "function": {"name": name, "arguments": json.dumps(arguments)}}


def fact(r: random.Random, i: int) -> dict:
    if i % 4 == 3:
        name, symbol, number = ELEMENTS[i // 4]
        return {"messages": [says("user", f"What is the symbol of {name}, and its atomic number?"),
                             says("assistant", f"Its symbol is {symbol}, its atomic number {number}.")]}  # fmt: skip
    country, city = CAPITALS[i - i // 4]
    return {"messages": [*system(r.choice(PERSONAS)), says("user", f"What is the capital of {country}?"),
                         says("assistant", f"The capital of {country} is {city}.")]}  # fmt: skip


def arithmetic(r: random.Random, i: int) -> dict:
    a, b, c = r.randint(12, 99), r.randint(12, 99), r.randint(2, 9)
    name = r.choice(NAMES)
    if i % 2:
        question = f"{name} has {a} marbles and wins {b} more. How many are there?"
        answer = f"{name} has {a + b} marbles."
        thought = f"{a} + {b}: {a} + {b // 10 * 10} = {a + b // 10 * 10}, and {b % 10} more is {a + b}."
    else:
        question, answer = f"What is {a} times {c}?", f"{a} times {c} is {a * c}."
        thought = f"{a // 10 * 10} * {c} = {a // 10 * 10 * c} and {a % 10} * {c} = {a % 10 * c}; together {a * c}."
    return {"thinking_mode": "thinking",
            "messages": [says("user", question), says("assistant", answer, reasoning_content=thought)]}  # fmt: skip


def dialogue(r: random.Random, i: int) -> dict:
    (big, small, factor), n, m = UNITS[i % 4], r.randint(2, 20), r.randint(21, 60)
    thinks = i % 2 == 0

    def answer(x: int) -> dict:
        thought = {"reasoning_content": f"{factor} {small} each: {x} * {factor} = {x * factor}."}
        return says("assistant", f"{x} {big} are {x * factor} {small}.", **(thought if thinks else {}))

    messages = [*system(r.choice(PERSONAS)),
                says("user", f"How many {small} are {n} {big}?"), answer(n),
                says("user", f"And {m} {big}?"), answer(m),
                says("user", "Thanks!"), says("assistant", "You are welcome.")]  # fmt: skip
    if i % 5 == 0:  # a turn that should not be learned
        wrong = says("assistant", f"{n} {big} are {n * factor + 1} {small}.", step_loss_mask=0)
        messages[-5:-5] = [wrong, says("user", "Please check that again.")]
    return {"messages": messages} | ({"thinking_mode": "thinking"} if thinks else {})


def with_tools(r: random.Random, i: int) -> dict:
    city, other = r.sample([city for _, city in CAPITALS], 2)
    sky, sky2, count, article = r.choice(SKIES), r.choice(SKIES), r.randint(0, 90), r.choice(WORDS)
    if i % 2:
        row = {"messages": [says("user", f"How many pieces of the article {article} are left?"),
                            says("assistant", "", tool_calls=[call(1, "count_stock", article=article)]),
                            says("tool", json.dumps({"pieces": count}), tool_call_id="c1"),
                            says("assistant", f"There are {count} pieces left.")]}  # fmt: skip
    else:
        calls = [call(1, "get_weather", city=city, days=1), call(2, "get_weather", city=other, days=1)]
        row = {"messages": [says("user", f"Is it nicer in {city} or in {other} tomorrow?"),
                            says("assistant", "Let me look.", tool_calls=calls),
                            says("tool", sky2, tool_call_id="c2"), says("tool", sky, tool_call_id="c1"),
                            says("assistant", f"Tomorrow {city} is {sky} and {other} is {sky2}.")]}  # fmt: skip
    if i % 4 < 2:
        row["thinking_mode"] = "thinking"
        row["messages"][1]["reasoning_content"] = "I need the tool for that."
    return {"tools": [STOCK if i % 2 else WEATHER], "messages": row["messages"]} | row


def other(r: random.Random, i: int) -> dict:
    kind, word, name = i % 5, WORDS[i // 5 % 12], NAMES[i % 10]
    if kind == 0:
        chinese, english = CHINESE[i // 5]
        messages = [says("user", f"“{chinese}”用英语怎么说？"), says("assistant", f"“{chinese}”用英语说“{english}”。")]
    elif kind == 1:
        sign, meaning = EMOJI[i // 5]
        messages = [says("user", f"What does {sign} show?"), says("assistant", f"{sign} shows {meaning}.")]
    elif kind == 2:
        schema = {"type": "json_schema", "schema": {"word": "string", "letters": "integer"}}
        answer = json.dumps({"word": word, "letters": len(word)})
        messages = [says("system", "", response_format=schema), says("user", f"Measure {word}."),
                    says("assistant", answer)]  # fmt: skip
    elif kind == 3:
        day = f"2026-03-{10 + i // 5:02}"
        messages = [says("latest_reminder", f"{day}, {name}"), says("user", "What day is it, and who am I?"),
                    says("assistant", f"It is {day}, and you are {name}.")]  # fmt: skip
    else:
        code = f'```python\nprint("{word}"[::-1])\n```'
        messages = [says("user", f"Print {word} backwards in Python."), says("assistant", code, task="title"),
                    says("assistant", f"Reversing {word}")]  # fmt: skip
    return {"messages": messages}


def rows() -> list[dict]:
    """All 200, mixed."""
    r = random.Random(0)
    made = [make(r, i) for make in (fact, arithmetic, dialogue, with_tools, other) for i in range(EACH)]
    r.shuffle(made)
    return made


if __name__ == "__main__":
    SAMPLE.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows()), encoding="utf-8")
    print(f"{SAMPLE}: {len(rows())} conversations, {SAMPLE.stat().st_size / 1e3:.0f} kB")
