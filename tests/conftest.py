"""Options of the test run."""


def pytest_addoption(parser):
    parser.addoption(
        "--whole",
        action="store_true",
        help="128 tokens of every family in every type and share (make test-whole)",
    )
