"""Tables of figures: a cell, the largest of a column, a row's total, growth between two columns.

Rows are products, columns quarters or months; lines and stripes vary, fonts are those of the split. What
needs reckoning is answered with thinking: the numbers that were read, then the steps. The base has seen bars
and lines with at most one number each (`tasks.charts`), never a table.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from duomo.tasks.charts import GROWTHS, MONTHS
from duomo.tasks.drawing import Canvas, noisy, tint
from duomo.tasks.pools import Pools
from duomo.tasks.scene import Example, Language, Pixels, Turn, any_language, pick, split_of

CELL_PX, NAME_PX = (28, 42), 42  # a cell's height and width, and the width of the column of names
HIGHEST = 20
PRODUCTS = ("Tea", "Cup", "Pen", "Book", "Box", "Ball")
QUARTERS = ("Q1", "Q2", "Q3", "Q4")
VALUE = {
    "en": ("What is the value of {p} in {a}?", "Table: how much is {p} in {a}?"),
    "zh": ("表中{p}在{a}的数值是多少？", "{p}在{a}是多少？"),
}
LARGEST = {
    "en": ("Which product is the largest in {a}?", "Which row is highest in {a}?"),
    "zh": ("{a}哪个产品最大？", "表中{a}最高的是哪一行？"),
}
TOTAL = {
    "en": ("What is the total of {p}?", "Add up the row {p}."),
    "zh": ("{p}的总和是多少？", "把{p}一行加起来是多少？"),
}
GROWTH = {
    "en": ("By how many percent did {p} grow from {a} to {b}?", "What is the growth of {p} from {a} to {b}?"),
    "zh": ("{p}从{a}到{b}增长了百分之多少？", "{p}从{a}到{b}的增长率是多少？"),
}


class Table(NamedTuple):
    """`values` [row][column]; the row `grown` grows by one of GROWTHS from the first to the last column."""

    products: tuple[str, ...]
    columns: tuple[str, ...]
    values: tuple[tuple[int, ...], ...]
    grown: int

    @property
    def scene(self) -> str:
        rows = (f"{p}={v}" for p, v in zip(self.products, self.values, strict=True))
        return f"table {self.columns} {' '.join(rows)}"


def generate(rng: np.random.Generator, pools: Pools) -> Example:
    """A table with two cells, the largest of a column, a total and a growth with thinking."""
    while True:
        table = _table(rng)
        if split_of(table.scene) == pools.split:
            break
    turns = [_total(rng, table), _growth(rng, table)]
    for _ in range(2):
        row, column = int(rng.integers(len(table.products))), int(rng.integers(len(table.columns)))
        asked = pick(rng, VALUE[any_language(rng)]).format(p=table.products[row], a=table.columns[column])
        turns.append(Turn(asked, str(table.values[row][column]), kind="tables/value"))
    column = int(rng.integers(len(table.columns)))
    figures = [row[column] for row in table.values]
    if figures.count(max(figures)) == 1:
        asked = pick(rng, LARGEST[any_language(rng)]).format(a=table.columns[column])
        turns.append(Turn(asked, table.products[figures.index(max(figures))], kind="tables/largest"))
    return Example(tuple(turns), table.scene, draw(rng, table, pick(rng, pools.fonts)))


def _table(rng: np.random.Generator) -> Table:
    num_rows, num_columns = int(rng.integers(2, 4)), int(rng.integers(2, 4))
    products = tuple(str(p) for p in rng.permutation(PRODUCTS)[:num_rows])
    heads = QUARTERS if rng.random() < 0.5 else MONTHS
    first = int(rng.integers(0, len(heads) - num_columns + 1))
    values = rng.integers(1, HIGHEST + 1, size=(num_rows, num_columns))
    grown, growth = int(rng.integers(num_rows)), int(rng.choice(GROWTHS))
    bases = [
        v for v in range(1, HIGHEST + 1) if v * growth % 100 == 0 and v * (100 + growth) <= 100 * HIGHEST
    ]
    base = int(rng.choice(bases))
    values[grown, 0], values[grown, -1] = base, base * (100 + growth) // 100
    listed = tuple(tuple(int(v) for v in row) for row in values)
    return Table(products, heads[first : first + num_columns], listed, grown)


def _total(rng: np.random.Generator, table: Table) -> Turn:
    language, row = any_language(rng), int(rng.integers(len(table.products)))
    values, steps = table.values[row], []
    total = values[0]
    for value in values[1:]:
        steps.append(f"{total}+{value}={total + value}")
        total += value
    asked = pick(rng, TOTAL[language]).format(p=table.products[row])
    return Turn(asked, str(total), _thought(language, values, steps), "tables/total thinking")


def _growth(rng: np.random.Generator, table: Table) -> Turn:
    language = any_language(rng)
    low, high = table.values[table.grown][0], table.values[table.grown][-1]
    growth = f"{(high - low) * 100 // low}%"
    steps = [f"{high}-{low}={high - low}", f"{high - low}/{low}={growth}"]
    asked = pick(rng, GROWTH[language]).format(
        p=table.products[table.grown], a=table.columns[0], b=table.columns[-1]
    )
    return Turn(asked, growth, _thought(language, (low, high), steps), "tables/growth thinking")


def _thought(language: Language, read: tuple[int, ...], steps: list[str]) -> str:
    comma, stop = (", ", ".") if language == "en" else ("，", "。")
    gap = " " if language == "en" else ""
    return f"{comma.join(map(str, read))}{stop}{gap}{comma.join(steps)}{stop}"


def draw(rng: np.random.Generator, table: Table, font: str) -> Pixels:
    """As high and wide as rows and columns need, up to the next whole 28 pixels."""
    cell_height, cell_width = CELL_PX
    height = cell_height * (len(table.products) + 1)
    width = -(-(NAME_PX + cell_width * len(table.columns)) // 28) * 28
    ink, paper = tint(rng, 10, 60), tint(rng, 235, 255)
    canvas, size = Canvas(height, width, paper), int(rng.integers(15, 18))
    head = tint(rng, 190, 225)
    canvas.box(0, 0, width, cell_height, head if rng.random() < 0.6 else paper)
    is_striped, is_ruled = bool(rng.random() < 0.4), bool(rng.random() < 0.5)
    for index, (product, values) in enumerate(zip(table.products, table.values, strict=True), start=1):
        top = cell_height * index
        if is_striped and index % 2 == 0:
            canvas.box(0, top, width, top + cell_height, tint(rng, 222, 234))
        if is_ruled:
            canvas.line([(0, top), (width, top)], tint(rng, 120, 180), 0.5)
        canvas.text(NAME_PX / 2, top + cell_height / 2, product, font, min(size, 14), ink)
        for column, value in enumerate(values):
            x = NAME_PX + cell_width * (column + 0.5) + rng.uniform(-1.5, 1.5)
            canvas.text(x, top + cell_height / 2 + rng.uniform(-1, 1), str(value), font, size, ink)
    for column, name in enumerate(table.columns):
        x = NAME_PX + cell_width * (column + 0.5)
        canvas.text(x, cell_height / 2, name, font, min(size, 14), ink)
        if is_ruled:
            canvas.line([(x - cell_width / 2, 0), (x - cell_width / 2, height)], tint(rng, 120, 180), 0.5)
    canvas.line([(0, cell_height), (width, cell_height)], ink)
    return noisy(rng, canvas.pixels(), 3.0)
