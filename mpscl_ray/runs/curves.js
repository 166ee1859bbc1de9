"use strict";
// Draws what mpscl_ray/runs/curves.py describes: a chart for each panel, with one cursor and one zoom for all.
function drawCurves(place, curves) {
  const charts = [];
  const cursor = uPlot.sync(place.id);
  const width = () => Math.max(320, place.clientWidth);
  const zoom = (own) => {
    const { min, max } = own.scales.x;
    for (const chart of charts) {
      if (chart !== own && (chart.scales.x.min !== min || chart.scales.x.max !== max)) {
        chart.setScale("x", { min, max });
      }
    }
  };
  const phases = (chart) => {
    const { ctx, bbox } = chart;
    ctx.save();
    ctx.strokeStyle = ctx.fillStyle = "#777777";
    ctx.textAlign = "left";
    ctx.font = `${11 * devicePixelRatio}px sans-serif`;
    for (const { start, name } of curves.phases) {
      const x = Math.round(chart.valToPos(start, "x", true));
      if (x < bbox.left - 1 || x > bbox.left + bbox.width) continue;
      ctx.beginPath();
      ctx.moveTo(x, bbox.top);
      ctx.lineTo(x, bbox.top + bbox.height);
      ctx.stroke();
      ctx.fillText(name.replaceAll("_", " "), x + 4 * devicePixelRatio, bbox.top + 12 * devicePixelRatio);
    }
    ctx.restore();
  };
  for (const panel of curves.panels) {
    const few = curves.steps.length < 60;
    const series = panel.curves.map((curve) => ({
      label: curve.name, stroke: curve.colour, width: curve.width, dash: curve.dash, spanGaps: true,
      points: { show: few || curve.values.filter((value) => value !== null).length < 60, size: 4 },
      value: (chart, value) => (value === null || value === undefined ? "" : value.toPrecision(3)),
    }));
    const options = {
      title: panel.title, width: width(), height: 240,
      cursor: { sync: { key: cursor.key, setSeries: false }, drag: { x: true, y: false } },
      scales: { x: { time: false } },
      axes: [{ label: "iteration", labelSize: 18, size: 34 }, { size: 56 }],
      series: [{ label: "iteration" }, ...series],
      hooks: { draw: [phases], setScale: [(chart, key) => { if (key === "x" && charts.length) zoom(chart); }] },
    };
    const box = document.createElement("div");
    place.append(box);
    charts.push(new uPlot(options, [curves.steps, ...panel.curves.map((curve) => curve.values)], box));
  }
  addEventListener("resize", () => charts.forEach((chart) => chart.setSize({ width: width(), height: 240 })));
  return charts;
}
