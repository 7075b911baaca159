"use strict";

// A player shows frame k of every model together; the range input is the one place that holds k.
for (const player of document.querySelectorAll(".player")) {
  const slider = player.querySelector("input");
  const output = player.querySelector("output");
  const button = player.querySelector("button");
  const stage = player.querySelector(".stage");
  const stacks = [...player.querySelectorAll(".frames")].map((stack) => [...stack.children]);
  const labels = JSON.parse(player.dataset.labels);
  const last = Number(slider.max);
  const calm = matchMedia("(prefers-reduced-motion: reduce)");
  let timer = 0;
  let step = 1;

  const show = () => {
    const k = Number(slider.value);
    for (const frames of stacks) frames.forEach((frame, i) => frame.classList.toggle("on", i === k));
    output.textContent = labels[k];
    slider.setAttribute("aria-valuetext", labels[k]);
  };
  const advance = () => {
    let k = Number(slider.value) + step;
    if (player.dataset.round) k = (k + last + 1) % (last + 1);
    else if (k < 0 || k > last) {
      step = -step;
      k = Number(slider.value) + step;
    }
    slider.value = k;
    show();
  };
  const play = (on) => {
    clearInterval(timer);
    timer = on && last > 0 ? setInterval(advance, calm.matches ? 500 : 90) : 0;
    if (button) button.textContent = timer ? "Pause" : "Play";
  };

  slider.disabled = last < 1;
  slider.addEventListener("input", () => {
    play(false);
    show();
  });
  if (button) {
    button.hidden = last < 1;
    button.addEventListener("click", () => play(!timer));
    // It turns by itself once, when first seen, unless the reader asked for less motion; it rests out of sight.
    let greeted = calm.matches;
    new IntersectionObserver(([entry]) => {
      if (!entry.isIntersecting) play(false);
      else if (!greeted) {
        greeted = true;
        play(true);
      }
    }, { threshold: 0.5 }).observe(player);
  }
  let grip = null;
  stage.addEventListener("pointerdown", (event) => {
    if (event.button) return;
    grip = { x: event.clientX, k: Number(slider.value) };
    stage.setPointerCapture(event.pointerId);
    play(false);
  });
  stage.addEventListener("pointermove", (event) => {
    if (!grip) return;
    const width = stacks[0][0].getBoundingClientRect().width * 1.5;
    slider.value = Math.round(grip.k + ((event.clientX - grip.x) / width) * last);
    show();
  });
  for (const end of ["pointerup", "pointercancel"]) stage.addEventListener(end, () => (grip = null));
  show();
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
