"use strict";

document.documentElement.classList.add("js");
const calm = matchMedia("(prefers-reduced-motion: reduce)");

// What a slider holds, in words, beside it and for those who do not see it.
const tell = (slider) => {
  const label = JSON.parse(slider.dataset.labels)[slider.value];
  document.querySelector(`output[for="${slider.id}"]`).textContent = label;
  slider.setAttribute("aria-valuetext", label);
  return label;
};

// A finger or the mouse on a picture: `move` gets how far it went, in sizes of the picture, since it was put down.
const drag = (stage, start, move) => {
  let grip = null;
  stage.addEventListener("pointerdown", (event) => {
    const picture = event.target.closest(".frames, .pair");
    if (event.button || !picture) return;
    grip = { x: event.clientX, y: event.clientY, box: picture.getBoundingClientRect() };
    stage.setPointerCapture(event.pointerId);
    start(event, grip.box);
  });
  stage.addEventListener("pointermove", (event) => {
    if (grip) move((event.clientX - grip.x) / grip.box.width, (event.clientY - grip.y) / grip.box.height);
  });
  for (const end of ["pointerup", "pointercancel"]) stage.addEventListener(end, () => (grip = null));
};

// A player shows one picture of every model's sheet; the range inputs are the one place that holds which.
for (const player of document.querySelectorAll(".player")) {
  const sliders = [...player.querySelectorAll("input")];
  const frames = [...player.querySelectorAll(".frames")];
  const stops = [...player.querySelectorAll("[data-stop]")];
  const button = player.querySelector(".play");
  const [first] = sliders;
  const last = Number(first.max);
  let timer = 0;
  let step = 1;

  const show = () => {
    const said = sliders.map((slider) => `${slider.labels[0].textContent} ${tell(slider)}`);
    for (const frame of frames) {
      sliders.forEach((slider, i) => frame.style.setProperty(i ? "--y" : "--x", slider.value));
      frame.setAttribute("aria-label", [frame.dataset.name, ...said].join(", "));
    }
    for (const stop of stops) stop.setAttribute("aria-pressed", stop.dataset.stop === first.value);
  };
  const advance = () => {
    let k = Number(first.value) + step;
    if (k < 0 || k > last) {
      step = -step;
      k = Number(first.value) + step;
    }
    first.value = k;
    show();
  };
  const play = (on) => {
    clearInterval(timer);
    timer = on && last > 0 ? setInterval(advance, calm.matches ? 600 : 2200 / (last + 1)) : 0;
    if (button) button.textContent = timer ? "Pause" : "Play";
  };

  for (const slider of sliders) {
    slider.addEventListener("input", () => {
      play(false);
      show();
    });
  }
  for (const stop of stops) {
    stop.addEventListener("click", () => {
      play(false);
      first.value = stop.dataset.stop;
      show();
    });
  }
  if (button) {
    button.hidden = last < 1;
    button.addEventListener("click", () => play(!timer));
    new IntersectionObserver(([entry]) => entry.isIntersecting || play(false)).observe(player);
  }
  let held = [];
  drag(
    player.querySelector(".stage"),
    () => {
      play(false);
      held = sliders.map((slider) => Number(slider.value));
    },
    (...far) => {
      sliders.forEach((slider, i) => {
        slider.value = Math.round(held[i] + far[i] * slider.max * slider.dataset.drag);
      });
      show();
    },
  );
  show();
}

// The wipe: a photo above what a model makes of it, cut off at an edge; or the difference of the two.
for (const wipe of document.querySelectorAll(".wipe")) {
  const [edge, which] = wipe.querySelectorAll("input[type=range]");
  const check = wipe.querySelector("input[type=checkbox]");
  const pairs = [...wipe.querySelectorAll(".pair")];
  for (const pair of pairs) {
    pair.append(new Image(), new Image());
    for (const picture of pair.children) Object.assign(picture, { alt: "", draggable: false });
  }

  const cut = () => {
    const said = `photo ${Number(which.value) + 1}, left ${tell(edge)} the original`;
    for (const pair of pairs) {
      pair.style.setProperty("--edge", `${(100 * edge.value) / edge.max}%`);
      pair.classList.toggle("difference", check.checked);
      pair.setAttribute("aria-label", `${pair.dataset.name}, ${check.checked ? "difference to the photo" : said}`);
    }
  };
  const choose = () => {
    tell(which);
    const [photo, ...made] = document.querySelectorAll(`.thumb[data-group="heldout-${which.value}"] img`);
    pairs.forEach((pair, i) => {
      pair.children[0].src = made[i].src;
      pair.children[1].src = photo.src;
    });
    cut();
  };

  edge.addEventListener("input", cut);
  check.addEventListener("change", cut);
  which.addEventListener("input", choose);
  let held = 0;
  const go = (far) => {
    edge.value = Math.round((held + far) * edge.max);
    cut();
  };
  drag(
    wipe.querySelector(".stage"),
    (event, box) => {
      held = (event.clientX - box.left) / box.width;
      go(0);
    },
    go,
  );
  choose();
}

// The viewer enlarges the pictures of one group (a held-out photo and its reconstructions, or one album photo).
const viewer = document.getElementById("viewer");
const shown = viewer.querySelector(".shown");
const thumbs = [...document.querySelectorAll(".thumb")];
let group = null;

const open = (name) => {
  const members = thumbs.filter((thumb) => thumb.dataset.group === name);
  group = name;
  viewer.querySelector("h2").textContent = members[0].dataset.title;
  shown.replaceChildren(...members.map((thumb) => {
    const figure = document.createElement("figure");
    const picture = thumb.querySelector("img").cloneNode();
    const caption = document.createElement("figcaption");
    picture.removeAttribute("loading");
    caption.textContent = thumb.dataset.name;
    caption.className = thumb.dataset.key;
    figure.append(picture, caption);
    return figure;
  }));
  shown.classList.toggle("one", members.length === 1);
  if (!viewer.open) viewer.showModal();
};
const go = (by) => {
  const section = group.split("-")[0];
  const groups = [...new Set(thumbs.map((t) => t.dataset.group))].filter((g) => g.startsWith(section + "-"));
  open(groups[(groups.indexOf(group) + by + groups.length) % groups.length]);
};

for (const thumb of thumbs) thumb.addEventListener("click", () => open(thumb.dataset.group));
for (const arrow of viewer.querySelectorAll("[data-go]")) arrow.addEventListener("click", () => go(Number(arrow.dataset.go)));
viewer.querySelector("[data-close]").addEventListener("click", () => viewer.close());
viewer.addEventListener("click", (event) => event.target === viewer && viewer.close());
viewer.addEventListener("keydown", (event) => {
  if (event.key === "ArrowLeft") go(-1);
  if (event.key === "ArrowRight") go(1);
});
