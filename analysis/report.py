def make_report(report, out):
    print("report", report, out)
