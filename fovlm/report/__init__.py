"""From run folders to a page that decides: collect, compare, fit, draw, write (`build.write_report`)."""
