"""Source files as syntax trees: lengths of functions, uses of private names."""

import ast
import io
import tokenize
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
# Tokens that are no code.
LAYOUT = {
    tokenize.COMMENT,
    tokenize.DEDENT,
    tokenize.ENDMARKER,
    tokenize.INDENT,
    tokenize.NEWLINE,
    tokenize.NL,
}
# Built-in functions whose second argument is the name of an attribute.
BY_NAME = {"getattr", "hasattr", "setattr", "delattr"}
# The names under which a method has its object or its class.
RECEIVERS = {"self", "cls", "super()"}


@dataclass(frozen=True)
class Module:
    """A source file.

    Attributes:
        path: Relative to the root of the repository.
        name: As it is imported, such as `axolotl_edpo.losses.edpo`.
        source: Its text.
    """

    path: Path
    name: str
    source: str

    @property
    def tree(self) -> ast.Module:
        """The syntax tree."""
        return ast.parse(self.source)


@dataclass(frozen=True)
class Function:
    """A function or a method.

    Attributes:
        where: `file:line`.
        name: With the classes and functions around it: `EDPOTrainer.log`.
        lines: Lines of code of its body.
    """

    where: str
    name: str
    lines: int

    def __str__(self) -> str:
        return f"{self.where} {self.name}: {self.lines} lines"


@dataclass(frozen=True)
class Use:
    """A use of a name that begins with one underscore.

    Attributes:
        module: The file that uses it.
        line: Where.
        text: The expression.
        name: The private name.
        owner: The class around the use, or "".
        receiver: What stands before the dot; in an import, the module.
        imported: Whether it is an import.
    """

    module: Module
    line: int
    text: str
    name: str
    owner: str
    receiver: str
    imported: bool = False

    def __str__(self) -> str:
        return f"{self.module.path}:{self.line} {self.text}"


def modules_below(folder: Path, root: Path) -> list[Module]:
    """Every Python file below a folder of a repository."""
    modules = []
    for path in sorted(folder.rglob("*.py")):
        relative = path.relative_to(root)
        name = ".".join(relative.with_suffix("").parts).removesuffix(".__init__")
        modules.append(Module(relative, name, path.read_text()))
    return modules


def functions(module: Module) -> list[Function]:
    """Every function of a file, nested ones too.

    Lines of code are those of the body: no signature, docstring, blank line or comment.
    The lines of a nested function count for it and for the function around it.
    """
    tree = module.tree
    code = _code_lines(module.source) - _docstring_lines(tree)
    found = []
    for name, node in _definitions(tree):
        if isinstance(node, FUNCTIONS):
            body = range(_first_line(node.body[0]), (node.end_lineno or 0) + 1)
            where = f"{module.path}:{node.lineno}"
            found.append(Function(where, name, len(code.intersection(body))))
    return found


def _first_line(statement: ast.stmt) -> int:
    """Of a statement, with its decorators."""
    decorators = getattr(statement, "decorator_list", [])
    return min([statement.lineno, *(d.lineno for d in decorators)])


def _code_lines(source: str) -> set[int]:
    """Numbers of lines that hold more than a comment."""
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    return {
        line
        for token in tokens
        if token.type not in LAYOUT
        for line in range(token.start[0], token.end[0] + 1)
    }


def _docstring_lines(tree: ast.Module) -> set[int]:
    nodes = [tree, *(node for _, node in _definitions(tree))]
    lines: set[int] = set()
    for node in nodes:
        if ast.get_docstring(node, clean=False) is not None:
            text = node.body[0]
            lines.update(range(text.lineno, (text.end_lineno or 0) + 1))
    return lines


def _definitions(tree: ast.AST, prefix: str = "") -> Iterator[tuple[str, Definition]]:
    """Classes and functions by qualified name, each before what is in it."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, Definition):
            yield prefix + node.name, node
            yield from _definitions(node, f"{prefix}{node.name}.")
        else:
            yield from _definitions(node, prefix)


def is_private(name: str) -> bool:
    """Whether a name begins with an underscore and is no dunder name."""
    return name.startswith("_") and not (name.startswith("__") and name.endswith("__"))


def private_members(module: Module) -> dict[str, set[str]]:
    """The private names that each class of a file defines.

    They are its methods, its class attributes and what its methods assign to `self` or
    `cls`.

    Returns:
        By the name of the class; under "", the private names of the file itself.
    """
    tree = module.tree
    classes = [node for _, node in _definitions(tree) if isinstance(node, ast.ClassDef)]
    members = {node.name: {*_bound(node.body), *_assigned(node)} for node in classes}
    members[""] = {*_bound(tree.body)}
    return {name: set(filter(is_private, names)) for name, names in members.items()}


def bases(module: Module) -> dict[str, set[str]]:
    """The names of the classes that each class of a file is derived from."""
    classes = [c for _, c in _definitions(module.tree) if isinstance(c, ast.ClassDef)]
    return {c.name: {_last_name(base) for base in c.bases} for c in classes}


def _last_name(node: ast.expr) -> str:
    """`Base` of `Base`, `module.Base` and `Base[T]`."""
    node = node.value if isinstance(node, ast.Subscript) else node
    return node.attr if isinstance(node, ast.Attribute) else ast.unparse(node)


def _bound(body: list[ast.stmt]) -> Iterator[str]:
    """What the statements of a class or a file define and assign."""
    for statement in body:
        if isinstance(statement, Definition):
            yield statement.name
        else:
            for node in ast.walk(statement):
                if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                    yield node.id


def _assigned(node: ast.ClassDef) -> Iterator[str]:
    """The attributes that methods of a class assign to their object."""
    for part in ast.walk(node):
        if isinstance(part, ast.Attribute) and isinstance(part.ctx, ast.Store):
            if ast.unparse(part.value) in RECEIVERS:
                yield part.attr


def private_uses(module: Module) -> list[Use]:
    """Every attribute of a file that begins with one underscore, and every import."""
    finder = _Finder(module)
    finder.visit(module.tree)
    return finder.uses


class _Finder(ast.NodeVisitor):
    """Collects uses of private names, and the class that each is in."""

    def __init__(self, module: Module):
        self.uses: list[Use] = []
        self._module, self._classes = module, [""]

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        """Remembers the class while it visits what is in it."""
        self._classes.append(node.name)
        self.generic_visit(node)
        self._classes.pop()

    def visit_Attribute(self, node: ast.Attribute) -> None:
        """`expression._name`."""
        self._note(node, node.attr, node.value)
        self.generic_visit(node)

    def visit_Call(self, node: ast.Call) -> None:
        """`getattr(expression, "_name")` and the like."""
        if ast.unparse(node.func) in BY_NAME and len(node.args) > 1:
            name = node.args[1]
            if isinstance(name, ast.Constant) and isinstance(name.value, str):
                self._note(node, name.value, node.args[0])
        self.generic_visit(node)

    def visit_Import(self, node: ast.Import) -> None:
        """`import package._module`."""
        for alias in node.names:
            *above, last = alias.name.split(".")
            self._note_import(node, last, ".".join(above))

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        """`from module import _name`, from a file of the package or from elsewhere."""
        source = "." * node.level + (node.module or "")
        for alias in node.names:
            self._note_import(node, alias.name, source)

    def _note(self, node: ast.expr, name: str, receiver: ast.expr) -> None:
        if is_private(name):
            text, before = ast.unparse(node), ast.unparse(receiver)
            use = Use(self._module, node.lineno, text, name, self._classes[-1], before)
            self.uses.append(use)

    def _note_import(self, node: ast.stmt, name: str, source: str) -> None:
        if is_private(name):
            place = self._module, node.lineno, ast.unparse(node)
            self.uses.append(Use(*place, name, "", source, imported=True))


def imported_modules(module: Module) -> list[tuple[int, str]]:
    """Line and name of every module that a file imports, in functions too.

    `from package import name` counts as `package` and as `package.name`, as `name` may
    be a module.
    """
    found = []
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            source = node.module or ""
            names = [f"{source}.{alias.name}".lstrip(".") for alias in node.names]
            found += [(node.lineno, name) for name in [source, *names] if name]
    return found
