"""What the functions of an app do with a session, and in which order, told by their text.

Pure functions of a syntax tree. A call is known by its name: `commit()` of something whose name ends in "session",
`update()` or `delete()` of a query, and so on. A variable is an object of the session where everything that the
function assigns to it is one, and a statement where the function assigns it once.
"""

from __future__ import annotations

import ast
import dataclasses
import enum
from collections.abc import Iterable, Iterator, Sequence

from ..connection.classify import Effect, classify

__all__ = ["Event", "Function", "Kind", "functions_of"]


class Kind(enum.Enum):
    PENDING = "adds, changes or deletes an object, which a flush writes"
    FLUSH = "writes what is pending"
    SEND = "sends a write"
    COMMIT = "commits"
    ROLLBACK = "rolls back"
    UNDO = "rolls back after an error"
    READ = "runs a query"
    NEEDS_TRANSACTION = "has no effect in autocommit"
    SLOW = "waits for something that is not the database"
    CALL = "calls a function, whose name is `what`"


@dataclasses.dataclass(frozen=True)
class Event:
    kind: Kind
    line: int
    what: str
    """As a reader knows it: `commit()`, `query.delete()`."""
    in_block: bool


@dataclasses.dataclass
class Function:
    """A function, or a module's own statements, with what it does on its longest way through."""

    line: int
    name: str
    is_view: bool
    in_transaction: bool
    """A decorator runs it in a transaction."""
    events: list[Event]
    everything: list[Event]
    """What it does on any way."""
    calls: list[tuple[str, bool]]
    """Names of functions that it calls, and whether within a block."""


_BLOCKS = frozenset({"begin", "begin_nested", "transaction", "get_transaction"})
_IN_TRANSACTION = frozenset({"transactional", "transaction", "get_transaction", "transaction_required"})
_ROUTES = frozenset({"route", "get", "post", "put", "patch", "delete"})
_PENDING = frozenset({"add", "add_all", "delete", "merge"})
_EXECUTES = frozenset({"execute", "scalars", "scalar"})
_DML = frozenset({"insert", "update", "delete"})
_WRITERS = frozenset(
    ("bulk_save_objects bulk_insert_mappings bulk_update_mappings insert_many upsert_many update_many find_or_create "
     "get_or_create update_or_create m2m_add m2m_remove m2m_set m2m_clear").split()
)  # fmt: skip
_GIVE_OBJECTS = frozenset({"query", "get_or_404", "first_or_404", "one_or_404"})
_HTTP_CLIENTS = frozenset({"requests", "httpx", "urllib3"})
_HTTP_CALLS = frozenset({"get", "post", "put", "patch", "delete", "head", "request"})


def functions_of(tree: ast.Module) -> Iterator[Function]:
    """The functions of a module, nested ones and methods too, and the module's own statements."""
    yield _function(tree, 1, "the module", [])
    methods: set[ast.AST] = set()
    """Of class-based views: `get()`, `post()` and the like."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef) and any(_name(base).endswith("View") for base in node.bases):
            methods |= {each for each in node.body if getattr(each, "name", "") in _ROUTES | {"dispatch_request"}}
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            yield _function(node, node.lineno, f"{node.name}()", node.decorator_list, is_view=node in methods)


def _function(node: ast.Module | ast.FunctionDef | ast.AsyncFunctionDef, line: int, name: str,
              decorators: Sequence[ast.expr], *, is_view: bool = False) -> Function:  # fmt: skip
    names = [(each, isinstance(each, ast.Call)) for each in decorators]
    reader = _Reader(_assigned(node))
    events = reader.path(node.body, False)
    return Function(
        line,
        name,
        is_view or any(called and _name(each) in _ROUTES for each, called in names),
        any(_name(each) in _IN_TRANSACTION for each, _ in names),
        events,
        reader.everything,
        reader.calls,
    )


def _assigned(function: ast.AST) -> dict[str, list[ast.expr]]:
    """All that each name is assigned, or loops over, in a function."""
    found: dict[str, list[ast.expr]] = {}
    for node in ast.walk(function):
        if isinstance(node, ast.Assign) and len(node.targets) == 1 and isinstance(node.targets[0], ast.Name):
            found.setdefault(node.targets[0].id, []).append(node.value)
        elif isinstance(node, (ast.AnnAssign, ast.NamedExpr)) and isinstance(node.target, ast.Name) and node.value:
            found.setdefault(node.target.id, []).append(node.value)
        elif isinstance(node, ast.For) and isinstance(node.target, ast.Name):
            found.setdefault(node.target.id, []).append(node.iter)
    return found


class _Reader:
    """Reads the statements of one function."""

    def __init__(self, assigned: dict[str, list[ast.expr]]) -> None:
        self.assigned = assigned
        self.everything: list[Event] = []
        self.calls: list[tuple[str, bool]] = []

    def path(self, statements: Sequence[ast.stmt], in_block: bool) -> list[Event]:
        """The events of these statements: of two branches, of the one with more of them. A loop counts twice."""
        events: list[Event] = []
        for index, node in enumerate(statements):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
                continue
            if isinstance(node, (ast.If, ast.Match)):
                rest = self.path(statements[index + 1 :], in_block)
                branches = [node.body, node.orelse] if isinstance(node, ast.If) else [case.body for case in node.cases]
                test = node.test if isinstance(node, ast.If) else node.subject
                ways = [self.path(each, in_block) + ([] if _leaves(each) else rest) for each in branches]
                return events + self.expression(test, in_block) + max(ways, key=_weight)
            if isinstance(node, (ast.With, ast.AsyncWith)):
                for item in node.items:
                    events += self.expression(item.context_expr, in_block)
                events += self.path(node.body, in_block or any(self._opens(item.context_expr) for item in node.items))
            elif isinstance(node, (ast.For, ast.AsyncFor, ast.While)):
                events += self.expression(node.test if isinstance(node, ast.While) else node.iter, in_block)
                events += self.path(node.body, in_block) * 2 + self.path(node.orelse, in_block)
            elif isinstance(node, (ast.Try, ast.TryStar)):
                events += self.path(node.body, in_block)
                for handler in node.handlers:
                    caught = self.path(handler.body, in_block)
                    undone = [each for each in caught if each.kind is Kind.ROLLBACK]
                    events += [dataclasses.replace(each, kind=Kind.UNDO) for each in undone]
                events += self.path(node.orelse, in_block) + self.path(node.finalbody, in_block)
            else:
                events += self.expression(node, in_block)
                targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
                if any(self._is_object(each) for each in targets):
                    events += self._event(Kind.PENDING, node, "a changed attribute", in_block)
            if _leaves([node]):
                break
        return events

    def expression(self, node: ast.AST, in_block: bool, *, of_dml: bool = False) -> list[Event]:
        """The events of an expression, in the order in which it is evaluated."""
        if isinstance(node, ast.Lambda):
            return []
        if isinstance(node, (ast.ListComp, ast.SetComp, ast.GeneratorExp)):  # a loop, as in path()
            rest = [event for each in node.generators for event in self.expression(each, in_block)]
            return rest + self.expression(node.elt, in_block) * 2
        if not isinstance(node, ast.Call):
            read = isinstance(node, ast.Attribute) and node.attr == "query" and not of_dml
            if read and isinstance(node, ast.Attribute) and _is_model(node.value):
                return self._event(Kind.READ, node, f"{_name(node.value)}.query", in_block)
            inner = isinstance(node, ast.Attribute) and of_dml
            children: Iterable[ast.AST] = ast.iter_child_nodes(node)
            return [event for each in children for event in self.expression(each, in_block, of_dml=inner)]
        name = _name(node.func)
        self.calls.append((name, in_block))
        found = self._call(node, name, of_dml=of_dml)
        writes_a_query = found is not None and found[0] is Kind.SEND and name in _DML
        events = self.expression(node.func, in_block, of_dml=of_dml or writes_a_query)
        for each in (*node.args, *(keyword.value for keyword in node.keywords)):
            events += self.expression(each, in_block)
        kind, what = found or (Kind.CALL, name)
        return events + self._event(kind, node, what, in_block)

    def _event(self, kind: Kind, node: ast.expr | ast.stmt, what: str, in_block: bool) -> list[Event]:
        self.everything.append(Event(kind, node.lineno, what, in_block))
        return self.everything[-1:]

    def _is_object(self, target: ast.expr | None) -> bool:
        """Whether the target of an assignment is an attribute of an object that a query or a model has given."""
        if not isinstance(target, ast.Attribute) or not isinstance(target.value, ast.Name):
            return False
        values = self.assigned.get(target.value.id, [])
        return bool(values) and all(_gives_objects(each) for each in values)

    def _call(self, node: ast.Call, name: str, *, of_dml: bool) -> tuple[Kind, str] | None:
        if any(each.arg == "with_for_update" and not _is_false(each.value) for each in node.keywords):
            return Kind.NEEDS_TRANSACTION, f"{name}(with_for_update=)"
        if name in _WRITERS:
            return Kind.SEND, f"{name}()"
        if name in ("sleep", "urlopen"):
            return Kind.SLOW, f"{name}()"
        if not isinstance(node.func, ast.Attribute):
            return None
        of = node.func.value
        if name in _HTTP_CALLS and isinstance(of, ast.Name) and of.id in _HTTP_CLIENTS:
            return Kind.SLOW, f"{of.id}.{name}()"
        if name in _DML and "query" in _chain(of):
            return Kind.SEND, f"query.{name}()"
        if name == "with_for_update" and "query" in _chain(of):
            return Kind.NEEDS_TRANSACTION, "with_for_update()"
        return self._session_call(node, name, of_dml=of_dml) if self._is_session(of) else None

    def _opens(self, node: ast.expr) -> bool:
        """Whether `with` it opens a transaction of a session."""
        if not isinstance(node, ast.Call) or (name := _name(node.func)) not in _BLOCKS:
            return False
        of = node.func.value if isinstance(node.func, ast.Attribute) else None
        return not name.startswith("begin") or (of is not None and self._is_session(of))

    def _is_session(self, node: ast.expr) -> bool:
        """By its name, or by what the function assigns to it: `s = db.session`."""
        values = self.assigned.get(node.id, []) if isinstance(node, ast.Name) else []
        return _is_session(node) or (bool(values) and all(_is_session(each) for each in values))

    def _session_call(self, node: ast.Call, name: str, *, of_dml: bool) -> tuple[Kind, str] | None:
        if name in _PENDING:
            return Kind.PENDING, f"{name}()"
        if name in _EXECUTES and node.args:
            return self._statement(node.args[0])
        if name == "query":
            return None if of_dml else (Kind.READ, "query()")
        if name == "connection":
            return Kind.NEEDS_TRANSACTION, "connection()"
        kinds = {"flush": Kind.FLUSH, "commit": Kind.COMMIT, "rollback": Kind.ROLLBACK}
        return (kinds[name], f"{name}()") if name in kinds else None

    def _statement(self, node: ast.expr) -> tuple[Kind, str] | None:
        """What a statement is that is executed."""
        if isinstance(node, ast.Name):
            values = self.assigned.get(node.id, [])
            if len(values) != 1:
                return None
            node = values[0]
        names = _chain(node)
        if locking := next((each for each in names if each in ("with_for_update", "claim")), None):
            return Kind.NEEDS_TRANSACTION, f"{locking}()"
        if written := next((each for each in names if each in _DML), None):
            return Kind.SEND, written.upper()
        if "text" in names and isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            sql = str(node.args[0].value)
            found = classify(sql)
            if found.transaction_only:
                return Kind.NEEDS_TRANSACTION, found.transaction_only
            return (Kind.READ, "SELECT") if found.effect is Effect.READ else (Kind.SEND, " ".join(sql.split()[:3]))
        return (Kind.READ, "SELECT") if "select" in names else None


def _gives_objects(value: ast.expr) -> bool:
    """Whether it is a call of a query, of a session or of a model."""
    names = _chain(value) if isinstance(value, ast.Call) else []
    return bool(names) and (
        names[0][:1].isupper() or any(each in _GIVE_OBJECTS or each.lower().endswith("session") for each in names)
    )


def _weight(events: Sequence[Event]) -> int:
    return sum(each.kind is not Kind.CALL for each in events)


def _leaves(statements: Sequence[ast.stmt]) -> bool:
    return bool(statements) and isinstance(statements[-1], (ast.Return, ast.Raise, ast.Continue, ast.Break))


def _name(node: ast.AST) -> str:
    """The last name of an expression: `commit` of `db.session.commit`, and of a call of it."""
    if isinstance(node, ast.Attribute):
        return node.attr
    if isinstance(node, ast.Call):
        return _name(node.func)
    return node.id if isinstance(node, ast.Name) else ""


def _chain(node: ast.AST) -> list[str]:
    """All names of a chain of calls: `update`, `where`, `values` of `sa.update(T).where(...).values(...)`."""
    names = []
    while isinstance(node, (ast.Call, ast.Attribute)):
        if isinstance(node, ast.Attribute):
            names.append(node.attr)
            node = node.value
        else:
            node = node.func
    return [*names, node.id] if isinstance(node, ast.Name) else names


def _is_session(node: ast.AST) -> bool:
    return _name(node).lower().endswith("session")


def _is_model(node: ast.AST) -> bool:
    return _name(node)[:1].isupper()


def _is_false(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and not node.value
