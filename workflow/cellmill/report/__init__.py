"""The report: statistics over seeds (`summary`), charts, what is read (`inputs`) and the page itself (`page`)."""
