"""From run folders to a report: collect, compare, fit, draw, write (`build.write_report`)."""
