"""Options of the test run."""


def pytest_addoption(parser):
    parser.addoption(
        "--whole",
        action="store_true",
        help="mixtures: 128 tokens in every type with every number of slots (make test-whole)",
    )
