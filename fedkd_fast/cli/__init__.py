"""The subcommands of `fedkd-fast`; `fedkd_fast.__main__` puts them together."""
