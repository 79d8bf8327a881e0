# SPDX-License-Identifier: BSD-3-Clause
"""The demo's text: order messages of a small shop, what the shop writes about them, and two tasks on them.

Everything is drawn from word lists with a seed, so that every run of the demo sees the same text. Knows no models.
"""

import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

CUSTOMERS = (
    "Maria Anna Jonas Olga Pedro Lena Marco Sofia Henrik Clara Amir Nadia Tomas Ines Viktor Greta "
    "Hugo Selma Bruno Dora Felix Yara Oscar Paula Simon Rosa Karim Helena Anton Mira"
).split()
CITIES = (
    "Lisbon Berlin Oslo Madrid Paris Vienna Rome Prague Dublin Athens Warsaw Riga Porto Turin "
    "Bergen Lyon Zurich Basel Malmo Tallinn Krakow Seville Ghent Leipzig"
).split()
COLOURS = "red blue green black white yellow brown grey orange purple".split()
ITEMS = "lamp chair table mirror pillow basket carpet candle clock vase blanket kettle shelf bowl mug towel".split()
PAYMENTS = "card cash invoice cheque transfer".split()
DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
COUNTS = range(10, 100)

MESSAGES = (
    "{customer} from {city} orders {count} {colour} {items} on {day} and pays by {payment}.",
    "On {day} {customer} from {city} bought {count} {colour} {items}, payment by {payment}.",
    "{customer} in {city} would like {count} {items} in {colour} before {day}, paid by {payment}.",
    "Please send {count} {colour} {items} to {customer} in {city} on {day}; payment is by {payment}.",
    "{day}: {customer} called from {city} and wants {count} {items}, all {colour}, to be paid by {payment}.",
    "A {payment} order came from {city} on {day}: {count} {colour} {items} for {customer}.",
)
REMARKS = (
    "The {items} for {customer} must be {colour}.",
    "{customer} ordered {count} of them.",
    "The parcel goes to {city} for {customer}.",
    "We packed {count} {colour} {items}.",
    "{customer} lives in {city}.",
    "{count} {items} go to {city}.",
    "The box is marked '{city}', {count}.",
    "The note reads '{item}' and '{city}'.",
    "Every {item} is '{colour}', says {customer}.",
    "The label says '{customer}', '{city}'.",
    "The slip says '{item}', '{colour}', {count}.",
    "It was paid by {payment}, due on {day}.",
)
CATALOGUE = (
    "SELECT {item} FROM orders WHERE city = '{city}';",
    "UPDATE orders SET colour = '{colour}' WHERE customer = '{customer}';",
    "INSERT INTO stock VALUES ({count}, '{item}');",
    "Stock on {day}: {count} {colour} {items}.",
    "Price list for {city}: {items}, {colour}, by {payment}.",
)


@dataclass(frozen=True, slots=True)
class Order:
    """What one message says."""

    customer: str
    city: str
    count: int
    colour: str
    item: str
    payment: str
    day: str

    def fill(self, template: str) -> str:
        """Return ``template`` with this order's words."""
        plural = "shelves" if self.item == "shelf" else f"{self.item}s"
        return template.format(items=plural, **{name: getattr(self, name) for name in self.__slots__})


def draw_order(rng: random.Random) -> Order:
    """Draw one order; there are about 10^9 different ones, so a held-out one was practically never seen."""
    return Order(
        customer=rng.choice(CUSTOMERS),
        city=rng.choice(CITIES),
        count=rng.choice(COUNTS),
        colour=rng.choice(COLOURS),
        item=rng.choice(ITEMS),
        payment=rng.choice(PAYMENTS),
        day=rng.choice(DAYS),
    )


def to_sql(order: Order) -> str:
    """Return the answer of the task ``sql``."""
    return order.fill("INSERT INTO orders VALUES ('{customer}', '{city}', '{item}', '{colour}', {count});")


def to_summary(order: Order) -> str:
    """Return the answer of the task ``summarise``."""
    return order.fill("{customer} in {city}: {count} {items}")


TASKS: dict[str, Callable[[Order], str]] = {"sql": to_sql, "summarise": to_summary}


def documents(count: int, *, seed: int = 0) -> list[str]:
    """Return ``count`` documents of shop text: a message with remarks about it, or lines from the shop's books.

    The base learns the words, and to look facts up, from these. No document shows either task.
    """
    rng = random.Random(seed)
    found = []
    for _ in range(count):
        order = draw_order(rng)
        if rng.random() < 0.1:
            lines = [draw_order(rng).fill(rng.choice(CATALOGUE)) for _ in range(4)]
            found.append("\n".join(lines))
        else:
            remarks = [order.fill(t) for t in rng.sample(REMARKS, 5)] + [note(order, rng)]
            rng.shuffle(remarks)
            found.append(f"{order.fill(rng.choice(MESSAGES))}\n{' '.join(remarks)}")
    return found


def note(order: Order, rng: random.Random) -> str:
    """Return a remark that lists an order's facts in any order, so that the base learns each of them on its own."""
    facts = [repr(order.customer), repr(order.city), repr(order.item), repr(order.colour), str(order.count)]
    return f"Note: {', '.join(rng.sample(facts, 4))}."


def examples(task: str, count: int, *, seed: int) -> list[dict[str, str]]:
    """Return ``count`` examples of one task as prompt and completion."""
    rng = random.Random(seed)
    rows = []
    for _ in range(count):
        order = draw_order(rng)
        rows.append({"prompt": order.fill(rng.choice(MESSAGES)) + "\n", "completion": TASKS[task](order)})
    return rows


def write_jsonl(rows: list[dict[str, str]], path: Path) -> Path:
    """Write one JSON object for each line of ``path``."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path
